//! Rows to text and token ids: the only module that turns conversations, prompts and end tokens
//! into model input. Layer 6.
//!
//! Invariant: a row's prompt has the same ids in training, online RL, generation, evaluation and
//! chat. Its `tools` and `chat_template_kwargs` reach the template in all of them; every id is in
//! the model's vocabulary; every error names the row.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::chat::{ChatTemplate, RenderOptions, Rendered, TemplateSetup};
use super::format::{Content, Format, ParsedRow, RowContent};
use super::jinja::Clock;
use super::rows::Row;
use super::tokenizer::Tokenizer;
use crate::config::TemplateOptions;
use crate::error::{Error, Result};

/// The tokenizer and the chat templates of a model, as a command uses them.
pub struct ModelText {
    pub tokenizer: Arc<Tokenizer>,
    pub template: Option<ChatTemplate>,
}

impl ModelText {
    /// Opens those of a model folder, with an adapter if given. `options`: the run's template
    /// settings. Dates are those of the start, however long the run lasts.
    pub fn open(
        dir: &Path,
        adapter: Option<&Path>,
        options: &TemplateOptions,
    ) -> Result<ModelText> {
        let tokenizer = Tokenizer::of_model(dir, adapter)?;
        let template = ChatTemplate::of_run(&tokenizer, &template_setup(options, Clock::now()))?;
        Ok(ModelText { tokenizer: Arc::new(tokenizer), template })
    }

    /// Returns a renderer for a model whose embedding has `vocab` rows.
    pub fn renderer(&self, vocab: usize) -> Renderer<'_> {
        Renderer::new(&self.tokenizer, self.template.as_ref(), vocab)
    }
}

/// Returns the template settings of a run with these options that started at `clock`.
pub fn template_setup(options: &TemplateOptions, clock: Clock) -> TemplateSetup {
    TemplateSetup {
        tools: options.tools.as_ref().map(|tools| Value::Array(tools.0.clone())),
        kwargs: options.chat_template_kwargs.0.clone(),
        clock: Some(clock),
    }
}

/// Converts rows to ids, with the same settings for all rows of a run.
#[derive(Clone, Copy)]
pub struct Renderer<'a> {
    pub tokenizer: &'a Tokenizer,
    /// None: rows of plain text only.
    pub template: Option<&'a ChatTemplate>,
    /// Number of rows of the model's embedding.
    pub vocab: usize,
}

/// A prompt and its ids.
#[derive(Clone, Debug, PartialEq)]
pub struct RenderedPrompt {
    /// Not empty.
    pub ids: Vec<u32>,
    pub content: Content,
}

impl<'a> Renderer<'a> {
    pub fn new(
        tokenizer: &'a Tokenizer,
        template: Option<&'a ChatTemplate>,
        vocab: usize,
    ) -> Renderer<'a> {
        Renderer { tokenizer, template, vocab }
    }

    /// Tokenises a text of `row`. `add_special` adds the tokenizer's own special tokens (BOS for
    /// Llama): for plain text, not for a rendered conversation. Error: an id beyond the vocabulary.
    pub fn encode(&self, row: &Row, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let ids = self.tokenizer.encode(text, add_special)?;
        self.check(row, &ids)?;
        Ok(ids)
    }

    /// Returns an error if an id is beyond the model's vocabulary.
    pub fn check(&self, row: &Row, ids: &[u32]) -> Result<()> {
        let Some(id) = ids.iter().find(|id| **id as usize >= self.vocab) else { return Ok(()) };
        let (token, vocab) = (self.tokenizer.id_to_token(*id).unwrap_or_default(), self.vocab);
        Err(row.error(format!(
            "token {id} ({token:?}) is beyond the model's vocabulary of {vocab}; use the tokenizer that came with the \
             model, or resize the model's embedding"
        )))
    }

    /// Renders a conversation of `row` with the chat template and the row's `tools` and
    /// `chat_template_kwargs`. `prompt`: the assistant speaks next, so the template adds its
    /// generation prompt; if `chat_template_kwargs` has `continue_final_message`, the text ends
    /// with the last message's content instead, as in transformers.
    pub fn render(
        &self,
        row: &Row,
        example: &ParsedRow,
        messages: &[Value],
        prompt: bool,
    ) -> Result<Rendered> {
        let template = self.template.ok_or_else(|| {
            row.error(format!(
                "is a conversation, and {} has no chat template; add chat_template.jinja to that folder (for training, \
                 chat_template_path can name one), or give rows with plain text",
                self.tokenizer.dir().display()
            ))
        })?;
        let continues = prompt && self.continues(example);
        let tools = example.tools.as_ref().or(template.setup().tools.as_ref());
        let mut kwargs = template.setup().kwargs.clone();
        kwargs.extend(example.template_kwargs.clone());
        let options = RenderOptions {
            tools,
            add_generation_prompt: prompt && !continues,
            kwargs: Some(&kwargs),
        };
        let mut rendered = template
            .pick(tools.is_some())
            .and_then(|t| t.render(&Value::Array(messages.to_vec()), options))
            .map_err(|e| row.error(e.to_string()))?;
        if continues {
            cut_after_final_message(row, messages, &mut rendered.text)?;
        }
        Ok(rendered)
    }

    /// Whether the prompt of this row ends inside its last message (`continue_final_message`).
    pub(super) fn continues(&self, example: &ParsedRow) -> bool {
        let of_run = self.template.and_then(|template| template.setup().kwargs.get(CONTINUE));
        example.template_kwargs.get(CONTINUE).or(of_run) == Some(&Value::Bool(true))
    }

    /// Whether the template for this row marks the assistant's text.
    pub fn marks_turns(&self, example: &ParsedRow) -> bool {
        let Some(template) = self.template else { return false };
        let tools = example.tools.is_some() || template.setup().tools.is_some();
        template.pick(tools).is_ok_and(ChatTemplate::has_generation)
    }

    /// Returns the ids of a prompt: a text with the tokenizer's own special tokens, or a
    /// conversation rendered with the generation prompt.
    pub fn prompt_ids(&self, row: &Row, example: &ParsedRow, prompt: &Content) -> Result<Vec<u32>> {
        match prompt {
            Content::Text(text) => self.encode(row, text, true),
            Content::Chat(messages) => {
                let text = self.render(row, example, messages, true)?.text;
                self.encode(row, &text, false)
            }
        }
    }

    /// Returns the prompt of a row (`prompt`: a string or a list of messages); other fields are
    /// ignored.
    pub fn prompt(&self, row: &Row) -> Result<RenderedPrompt> {
        let example = Format::PromptOnly.parse(row, "")?;
        let RowContent::PromptOnly { prompt: content } = &example.content else {
            return Err(row.error("has no prompt; give \"prompt\", a string or a list of messages"));
        };
        let ids = self.prompt_ids(row, &example, content)?;
        match ids.is_empty() {
            true => Err(row.error("its prompt has no tokens; write at least one word")),
            false => Ok(RenderedPrompt { ids, content: content.clone() }),
        }
    }

    /// Returns prompt and answer as one sequence: texts end with `eos`, a conversation as its
    /// template ends it.
    pub fn whole(
        &self,
        row: &Row,
        example: &ParsedRow,
        prompt: &Content,
        answer: &Content,
        eos: Option<EosToken>,
    ) -> Result<Vec<u32>> {
        match (prompt, answer) {
            (Content::Text(prompt), Content::Text(answer)) => {
                let answer = eos.map_or(answer.clone(), |eos| eos.end(answer));
                self.encode(row, &format!("{prompt}{answer}"), true)
            }
            (Content::Chat(prompt), Content::Chat(answer)) => {
                let messages = [prompt.as_slice(), answer].concat();
                let text = self.render(row, example, &messages, false)?.text;
                self.encode(row, &text, false)
            }
            _ => Err(mixed(row)),
        }
    }
}

/// An argument of transformers' `apply_chat_template`, read from `chat_template_kwargs`.
pub(super) const CONTINUE: &str = "continue_final_message";

/// Truncates a rendered conversation after the text of its last message, so that the model
/// continues it. Trailing spaces stay if the template keeps them (transformers 5.17).
fn cut_after_final_message(row: &Row, messages: &[Value], text: &mut String) -> Result<()> {
    let said = messages.last().and_then(|m| m.get("content")).and_then(Value::as_str);
    let Some((said, at)) = said.and_then(|said| Some((said, text.rfind(said.trim())?))) else {
        return Err(row.error(format!(
            "{CONTINUE}=true, but the chat template does not write the text of the last message \
             unchanged; leave {CONTINUE} out, or use another template"
        )));
    };
    let kept = said.trim_start();
    let length = if text[at..].starts_with(kept) { kept.len() } else { said.trim().len() };
    text.truncate(at + length);
    Ok(())
}

/// The error for a row that mixes texts and conversations.
pub fn mixed(row: &Row) -> Error {
    row.error("mixes strings and lists of messages; make prompt and completions all strings or all messages")
}

/// The token that ends a completion.
#[derive(Clone, Copy, Debug)]
pub struct EosToken<'a> {
    pub text: &'a str,
    pub id: u32,
}

impl<'a> EosToken<'a> {
    /// Returns the token `named`, or else the tokenizer's own; None if there is neither. Error: it
    /// is not in the vocabulary.
    pub fn of(tokenizer: &'a Tokenizer, named: Option<&'a str>) -> Result<Option<EosToken<'a>>> {
        let Some(text) = named.or(tokenizer.eos_token()) else { return Ok(None) };
        match tokenizer.token_to_id(text) {
            Some(id) => Ok(Some(EosToken { text, id })),
            None => Err(Error::Config(format!(
                "eos_token={text:?} is not in the vocabulary of {}",
                tokenizer.dir().display()
            ))),
        }
    }

    /// The error for a tokenizer that lacks the EOS token that completions need.
    pub fn missing(tokenizer: &Tokenizer) -> Error {
        let message = "names no eos_token, so a model could not learn to stop; set eos_token=TOKEN";
        Error::model(tokenizer.dir().join("tokenizer_config.json"), message)
    }

    /// Appends the token to `text` unless it already ends with it.
    pub fn end(self, text: &str) -> String {
        if text.ends_with(self.text) { text.to_string() } else { format!("{text}{}", self.text) }
    }
}
