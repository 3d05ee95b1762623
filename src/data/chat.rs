//! Renders a model's chat template like transformers. Layer 6.
//!
//! Invariant: text and generation spans equal those of `apply_chat_template`, or rendering is an
//! error; a hostile template ends in an error after a bounded amount of work.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior};
use serde_json::{Map, Value};

use super::jinja::{self, Clock};
use super::template::emit::{self, MARK};
use super::template::{filters, operators, percent, python};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// A compiled chat template.
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
    origin: PathBuf,
    special: Map<String, Value>,
    blocks: usize,
    marker_taken: bool, // the template's own text holds a marker character
    named: NamedUse,
    setup: TemplateSetup,
}

/// The settings that a run passes to its chat templates.
#[derive(Clone, Default)]
pub struct TemplateSetup {
    pub tools: Option<Value>,
    pub kwargs: Map<String, Value>,
    /// The time that `strftime_now` reads. None: the system clock.
    pub clock: Option<Clock>,
}

/// The other templates of a model.
#[derive(Default)]
struct NamedUse {
    tool_use: Option<Box<ChatTemplate>>, // used for conversations with tools
    nameless: bool,                      // several templates, none of them named `default`
}

/// Optional inputs of a render besides the messages.
#[derive(Clone, Copy, Default)]
pub struct RenderOptions<'a> {
    pub tools: Option<&'a Value>, // a list of JSON schemas
    pub add_generation_prompt: bool,
    pub kwargs: Option<&'a Map<String, Value>>, // chat_template_kwargs; override special tokens
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    pub generation_spans: Vec<Range<usize>>, // in CHARACTERS of `text`, as in transformers
}

impl ChatTemplate {
    /// Compiles `source`. `origin` is the file that errors name; `special` holds `bos_token`,
    /// `eos_token` and the like.
    pub fn new(source: &str, origin: &Path, special: &Map<String, Value>) -> Result<ChatTemplate> {
        ChatTemplate::with_clock(source, origin, special, Arc::new(Clock::now))
    }

    /// Returns the template at `path`, or that of `tokenizer` if `path` is None; None if the
    /// tokenizer has none. See [`Tokenizer::take_template`].
    pub fn choose(path: Option<&str>, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
        let Some(path) = path else {
            return ChatTemplate::of_run(tokenizer, &TemplateSetup::default());
        };
        let mut tokenizer = tokenizer.clone();
        tokenizer.take_template(Path::new(path))?;
        ChatTemplate::of_run(&tokenizer, &TemplateSetup::default())
    }

    /// Compiles the templates of a tokenizer with the run's settings; None if it has no template.
    pub fn of_run(tokenizer: &Tokenizer, setup: &TemplateSetup) -> Result<Option<ChatTemplate>> {
        let Some(main) = tokenizer.chat_template() else { return Ok(None) };
        let compile = |source: &str| {
            let clock = setup.clock;
            ChatTemplate::with_clock(
                source,
                tokenizer.template_origin(),
                tokenizer.special_tokens(),
                Arc::new(move || clock.unwrap_or_else(Clock::now)),
            )
        };
        let mut template = compile(main)?;
        let tool_use = tokenizer.named_template("tool_use").map(compile).transpose()?;
        template.named.nameless = tokenizer.named_template("default").is_none();
        template.named.tool_use = tool_use.map(Box::new);
        template.setup = setup.clone();
        Ok(Some(template))
    }

    /// Returns the template of a tokenizer's folder; if there is none, the error says what to do.
    pub fn of(tokenizer: &Tokenizer) -> Result<ChatTemplate> {
        ChatTemplate::choose(None, tokenizer)?
            .ok_or_else(|| Error::model(tokenizer.dir(), NO_TEMPLATE))
    }

    /// The settings that the run passes to its templates.
    pub fn setup(&self) -> &TemplateSetup {
        &self.setup
    }

    /// Returns the template for a conversation with or without tools, chosen as in transformers.
    /// Error: the model has several templates and none of them applies.
    pub fn pick(&self, tools: bool) -> Result<&ChatTemplate> {
        match &self.named {
            NamedUse { tool_use: Some(own), .. } if tools => Ok(own),
            NamedUse { nameless: true, .. } => Err(Error::model(
                &self.origin,
                "has several chat templates, but none is named \"default\"; rename one to \
                 \"default\", or set chat_template_path",
            )),
            _ => Ok(self),
        }
    }

    /// Like [`ChatTemplate::new`], with a given clock for `strftime_now`. (transformers reads local
    /// time; the default clock here is UTC.)
    pub fn with_clock(
        source: &str,
        origin: &Path,
        special: &Map<String, Value>,
        clock: Arc<dyn Fn() -> Clock + Send + Sync>,
    ) -> Result<ChatTemplate> {
        let broken = |e: minijinja::Error| {
            Error::model(
                origin,
                format!("chat template: {}; correct it, or use the model's own template", said(&e)),
            )
        };
        let source = &source.replace("\r\n", "\n").replace('\r', "\n"); // as Jinja2's lexer does
        let (rewritten, blocks) = emit::emit(source).map_err(|(what, line)| {
            let next = "correct it, or use the model's own template";
            Error::model(origin, format!("chat template: {what} (line {line}); {next}"))
        })?;
        let mut env = Environment::new();
        env.set_syntax(
            SyntaxConfig::builder()
                .block_delimiters(format!("{MARK}%"), format!("%{MARK}"))
                .variable_delimiters(format!("{MARK}{{"), format!("}}{MARK}"))
                .comment_delimiters(format!("{MARK}#"), format!("#{MARK}"))
                .keep_trailing_newline(true)
                .build()
                .map_err(broken)?,
        );
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_fuel(Some(FUEL));
        env.set_recursion_limit(RECURSION);
        python::install(&mut env);
        filters::install(&mut env);
        operators::install(&mut env);
        percent::install(&mut env);
        jinja::install(&mut env, clock);
        env.add_template_owned(NAME, rewritten).map_err(broken)?;
        let marker_taken = source.contains(MARKER);
        Ok(ChatTemplate {
            env,
            source: source.to_string(),
            origin: origin.to_path_buf(),
            special: special.clone(),
            blocks,
            marker_taken,
            named: NamedUse::default(),
            setup: TemplateSetup::default(),
        })
    }

    /// The source text of the template.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The file that the template was read from.
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// Whether the template marks assistant text with `{% generation %}`.
    pub fn has_generation(&self) -> bool {
        self.blocks > 0
    }

    /// Renders a list of messages: objects with `role`, `content` and other keys.
    pub fn render(&self, messages: &Value, options: RenderOptions) -> Result<Rendered> {
        let mut context = self.special.clone();
        context.insert("messages".into(), messages.clone());
        context.insert("tools".into(), options.tools.cloned().unwrap_or(Value::Null));
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), Value::Bool(options.add_generation_prompt));
        for (key, value) in options.kwargs.into_iter().flatten() {
            context.insert(key.clone(), value.clone());
        }
        let (open, close) = self.markers(&context);
        context.insert(emit::OPEN.into(), Value::String(open.clone()));
        context.insert(emit::CLOSE.into(), Value::String(close.clone()));
        let text = self
            .env
            .get_template(NAME)
            .and_then(|t| t.render(minijinja::Value::from(Serde(&context))))
            .map_err(|e| Error::model(&self.origin, format!("chat template: {}", said(&e))))?;
        Ok(take_spans(&text, &open, &close))
    }

    /// Returns two strings that do not occur in the rendered text. U+FDD0 is a noncharacter, so the
    /// shortest pair suffices unless the input is hostile.
    fn markers(&self, context: &Map<String, Value>) -> (String, String) {
        if self.blocks == 0 {
            return (String::new(), String::new());
        }
        let taken = if self.marker_taken { 1 } else { 0 } + occurrences(context.values());
        // longer than any run of markers in the input, unless the template repeats it on purpose
        let run = MARKER.to_string().repeat(taken + 1);
        (format!("{run}<"), format!("{run}>"))
    }
}

const NAME: &str = "chat_template";
const MARKER: char = '\u{FDD0}';
/// Limit on the work of one render (instructions and copied text): at most two seconds.
const FUEL: u64 = 4_000_000;
const RECURSION: usize = 200;
const NO_TEMPLATE: &str = "has no chat template, but the data is a conversation; add \
                           chat_template.jinja to the folder, or give rows with plain text";

/// Counts the marker characters in the strings of the context.
fn occurrences<'a>(values: impl Iterator<Item = &'a Value>) -> usize {
    values
        .map(|v| match v {
            Value::String(s) => s.matches(MARKER).count(),
            Value::Array(items) => occurrences(items.iter()),
            Value::Object(map) => {
                map.keys().map(|k| k.matches(MARKER).count()).sum::<usize>()
                    + occurrences(map.values())
            }
            _ => 0,
        })
        .sum()
}

/// Removes the markers and returns their positions as spans of characters.
fn take_spans(marked: &str, open: &str, close: &str) -> Rendered {
    if open.is_empty() || !marked.contains(MARKER) {
        return Rendered { text: marked.to_string(), generation_spans: Vec::new() };
    }
    let mut text = String::with_capacity(marked.len());
    let (mut chars, mut starts, mut generation_spans) = (0, Vec::new(), Vec::new());
    let mut rest = marked;
    while let Some(c) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix(open) {
            starts.push(chars);
            rest = after;
        } else if let Some(after) = rest.strip_prefix(close) {
            generation_spans.extend(starts.pop().map(|s| s..chars));
            rest = after;
        } else {
            text.push(c);
            chars += 1;
            rest = &rest[c.len_utf8()..];
        }
    }
    Rendered { text, generation_spans }
}

/// Formats a template error on one line, with its line number.
fn said(error: &minijinja::Error) -> String {
    let what = match error.kind() {
        minijinja::ErrorKind::OutOfFuel => {
            "ran for too long (an endless or enormous loop?)".to_string()
        }
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_string),
    };
    error.line().map_or(what.clone(), |line| format!("{what} (line {line})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(source: &str) -> Result<ChatTemplate> {
        ChatTemplate::new(source, Path::new("m"), &Map::new())
    }

    fn render(source: &str, messages: Value) -> Result<Rendered> {
        template(source)?.render(&messages, RenderOptions::default())
    }

    #[test]
    fn spans_count_characters_and_forged_markers_stay_text() {
        let source = "{% for m in messages %}é{% generation %}{{ m.content }}{% endgeneration %}.\n{% endfor %}";
        let content = "日\u{FDD0}<\u{FDD0}\u{FDD0}>本";
        let r = render(source, json!([{"content": content}, {"content": ""}])).unwrap();
        assert_eq!(r.text, format!("é{content}.\né.\n"));
        assert_eq!(r.generation_spans, vec![1..8, 11..11]);
    }

    #[test]
    fn hostile_templates_end_in_an_error() {
        let loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
        assert!(render(loops, json!([])).unwrap_err().to_string().contains("ran for too long"));
        let recursion = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}";
        assert!(render(recursion, json!([])).is_err());
        let doubling = "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}";
        assert!(render(doubling, json!([])).is_err());
        assert!(render("{{ 'aaaaaaaaaa' * 100000000000 }}", json!([])).is_err());
        assert!(template("{% for %}").is_err());
        assert!(template("{% generation %}").is_err());
    }

    #[test]
    fn a_long_conversation_is_within_the_limits() {
        let source = "{% set ns = namespace(n=0) %}{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c | tojson }}\
                      {% endfor %}{% set ns.n = ns.n + 1 %}{{ '<' + m.role + '>' + m.content.strip() }}{% endfor %}";
        let message = json!({"role": "user", "content": "word ".repeat(1000), "tool_calls": [{"a": [1, 2, 3]}]});
        let text = render(source, Value::Array(vec![message; 4000])).unwrap().text;
        assert!(text.len() > 20_000_000);
    }

    #[test]
    fn a_raised_exception_keeps_its_message() {
        let e = render("a\n{{ raise_exception('roles must alternate') }}", json!([]))
            .unwrap_err()
            .to_string();
        assert_eq!(e, "m: chat template: roles must alternate (line 2)");
    }
}
