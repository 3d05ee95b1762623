//! TRL's dataset types: detects the type of a file's rows and checks each row against it. Layer 6.
//!
//! Invariant: the first row determines the type of all rows; a row that does not fit is an error
//! with its file and line. ShareGPT and Alpaca rows are converted, so the rest of the crate sees
//! only TRL's types.

use serde_json::{Map, Value, json};

use super::row::{Row, kind};
use crate::error::Result;

/// A text, or a conversation (a list of messages).
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    Text(String),
    Chat(Vec<Value>),
}

impl Content {
    pub fn is_chat(&self) -> bool {
        matches!(self, Content::Chat(_))
    }
}

/// The content of a row, by its [`Format`].
#[derive(Clone, Debug, PartialEq)]
pub enum RowContent {
    Text(String),
    Messages(Vec<Value>),
    PromptCompletion {
        prompt: Content,
        completion: Content,
    },
    PromptOnly {
        prompt: Content,
    },
    /// If the prompt is None, it is the common prefix of both.
    Preference {
        prompt: Option<Content>,
        chosen: Content,
        rejected: Content,
    },
    Unpaired {
        prompt: Content,
        completion: Content,
        label: bool,
    },
}

/// A checked row.
#[derive(Clone, Debug)]
pub struct ParsedRow {
    pub content: RowContent,
    pub tools: Option<Value>,
    pub template_kwargs: Map<String, Value>, // chat_template_kwargs
}

/// The dataset type, by its fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Text,
    Messages,
    PromptCompletion,
    PromptOnly,
    Preference,
    Unpaired,
    ShareGpt, // conversations: [{from, value}]
    Alpaca,   // instruction, input, output
}

/// Every field that some dataset type uses. Other columns are passed to rewards.
pub const FIELDS: [&str; 18] = [
    "text",
    "messages",
    "conversations",
    "prompt",
    "completion",
    "label",
    "chosen",
    "rejected",
    "margin",
    "completions",
    "labels",
    "input_ids",
    "instruction",
    "input",
    "output",
    "system",
    "tools",
    "chat_template_kwargs",
];

impl Format {
    /// Detects the format from the fields of a row. `text_field` is TRL's `dataset_text_field`.
    pub fn detect(row: &Row, text_field: &str) -> Result<Format> {
        let has = |f: &str| row.has(f);
        Ok(match () {
            _ if has("chosen") && has("rejected") => Format::Preference,
            _ if has("prompt") && has("completion") && has("label") => Format::Unpaired,
            _ if has("prompt") && has("completion") => Format::PromptCompletion,
            _ if has("messages") => Format::Messages,
            _ if has("conversations") => Format::ShareGpt,
            _ if has(text_field) => Format::Text,
            _ if has("instruction") && has("output") => Format::Alpaca,
            _ if has("prompt") => Format::PromptOnly,
            _ => {
                let known =
                    row.value.keys().map(|k| format!("{k:?}")).collect::<Vec<_>>().join(", ");
                return Err(row.error(format!(
                    "the fields {known} match no known kind of row; give {text_field:?}, \
                     \"messages\", \"prompt\" and \"completion\", or \"chosen\" and \
                     \"rejected\", or name the columns: columns=prompt:COLUMN,completion:COLUMN"
                )));
            }
        })
    }

    /// Checks and converts a row.
    pub fn parse(self, row: &Row, text_field: &str) -> Result<ParsedRow> {
        let content = match self {
            Format::Text => RowContent::Text(row.string(text_field)?.to_string()),
            Format::Messages => {
                RowContent::Messages(filled(row, "messages", row.messages("messages")?)?)
            }
            Format::ShareGpt => {
                RowContent::Messages(filled(row, "conversations", share_gpt(row)?)?)
            }
            Format::Alpaca => alpaca(row)?,
            Format::PromptCompletion => {
                let (prompt, completion) = pair(row, "prompt", "completion")?;
                RowContent::PromptCompletion { prompt, completion }
            }
            Format::PromptOnly => RowContent::PromptOnly { prompt: content(row, "prompt")? },
            Format::Preference => {
                let (chosen, rejected) = pair(row, "chosen", "rejected")?;
                // a text prompt beside conversations repeats their beginning, as in
                // ultrafeedback_binarized; TRL ignores it
                let prompt = match row.get("prompt") {
                    Some(Value::String(_)) if chosen.is_chat() => None,
                    Some(_) => Some(pair(row, "prompt", "chosen")?.0),
                    None => None,
                };
                RowContent::Preference { prompt, chosen, rejected }
            }
            Format::Unpaired => {
                let (prompt, completion) = pair(row, "prompt", "completion")?;
                RowContent::Unpaired { prompt, completion, label: row.bool("label")? }
            }
        };
        Ok(ParsedRow { content, tools: tools(row)?, template_kwargs: template_kwargs(row)? })
    }
}

/// Returns a note if the prompts or answers are texts although the model has a chat template
/// (`first` is one of the rows): such rows are joined without the template, as in TRL.
pub fn unused_template(first: &Row, has_template: bool) -> Option<&'static str> {
    let is_text = |field: &&str| first.value.get(*field).is_some_and(Value::is_string);
    let texts = ["prompt", "completion", "chosen"].iter().any(is_text);
    (has_template && texts).then_some(
        "The rows are texts, so the model's chat template is not used. For a chat model give \
         messages; columns=instruction:PROMPT,output:COMPLETION makes messages from two columns.",
    )
}

/// Whether a row is a conversation, judging by its fields.
pub fn is_conversation(row: &Row) -> bool {
    let list = |field: &str| row.get(field).is_some_and(Value::is_array);
    ["messages", "conversations", "instruction"].iter().any(|field| row.has(field))
        || ["prompt", "chosen"].iter().any(|field| list(field))
}

/// Reads a string or a list of messages.
fn content(row: &Row, field: &str) -> Result<Content> {
    match row.need(field)? {
        Value::String(text) => Ok(Content::Text(text.clone())),
        Value::Array(items) if items.first().is_some_and(|m| m.get("from").is_some()) => {
            Ok(Content::Chat(filled(row, field, from_value(row, field, items)?)?))
        }
        Value::Array(items) => {
            Ok(Content::Chat(filled(row, field, row.checked_messages(field, items)?)?))
        }
        other => Err(row.wrong(field, "a string or a list of messages", other)),
    }
}

/// Reads two fields, both strings or both conversations.
fn pair(row: &Row, a: &str, b: &str) -> Result<(Content, Content)> {
    let (x, y) = (content(row, a)?, content(row, b)?);
    if x.is_chat() != y.is_chat() {
        let name = |c: &Content| if c.is_chat() { "a list of messages" } else { "a string" };
        let message = format!(
            "{a:?} is {} and {b:?} is {}; make both strings or both messages",
            name(&x),
            name(&y)
        );
        return Err(row.error(message));
    }
    Ok((x, y))
}

fn filled(row: &Row, field: &str, messages: Vec<Value>) -> Result<Vec<Value>> {
    match messages.is_empty() {
        true => {
            Err(row.error(format!("field {field:?} is an empty list; give at least one message")))
        }
        false => Ok(messages),
    }
}

fn share_gpt(row: &Row) -> Result<Vec<Value>> {
    match row.need("conversations")? {
        Value::Array(items) if items.first().is_some_and(|m| m.get("role").is_some()) => {
            row.messages("conversations")
        }
        Value::Array(items) => from_value(row, "conversations", items),
        other => Err(row.wrong("conversations", "a list of messages", other)),
    }
}

/// Converts `{from, value}` to `{role, content}` and renames the speakers to the roles that chat
/// templates use.
fn from_value(row: &Row, field: &str, items: &[Value]) -> Result<Vec<Value>> {
    let convert = |(i, item): (usize, &Value)| {
        let Value::Object(message) = item else {
            return Err(row.wrong(
                &format!("{field}[{i}]"),
                "an object with \"from\" and \"value\"",
                item,
            ));
        };
        let mut out = Map::new();
        for (key, value) in message {
            match key.as_str() {
                "from" => {
                    let role = value.as_str().map(|name| match name {
                        "human" => "user",
                        "gpt" | "chatgpt" | "bot" | "model" => "assistant",
                        other => other,
                    });
                    out.insert("role".into(), role.map_or(value.clone(), Value::from))
                }
                "value" => out.insert("content".into(), value.clone()),
                _ => out.insert(key.clone(), value.clone()),
            };
        }
        Ok(Value::Object(out))
    };
    let messages: Vec<Value> = items.iter().enumerate().map(convert).collect::<Result<_>>()?;
    row.checked_messages(field, &messages)
}

/// Converts an Alpaca row: the user message is the instruction, followed by the input.
fn alpaca(row: &Row) -> Result<RowContent> {
    let mut user = row.string("instruction")?.to_string();
    if row.has("input") && !row.string("input")?.is_empty() {
        user = format!("{user}\n\n{}", row.string("input")?);
    }
    let mut prompt = vec![json!({"role": "user", "content": user})];
    if row.has("system") && !row.string("system")?.is_empty() {
        prompt.insert(0, json!({"role": "system", "content": row.string("system")?}));
    }
    let completion = vec![json!({"role": "assistant", "content": row.string("output")?})];
    Ok(RowContent::PromptCompletion {
        prompt: Content::Chat(prompt),
        completion: Content::Chat(completion),
    })
}

/// Reads a list of JSON schemas, or a JSON string of one.
fn tools(row: &Row) -> Result<Option<Value>> {
    let parsed = match row.get("tools") {
        None => return Ok(None),
        Some(Value::String(text)) => serde_json::from_str(text)
            .map_err(|e| row.error(format!("field \"tools\" is not valid JSON: {e}")))?,
        Some(other) => other.clone(),
    };
    match &parsed {
        Value::Null => Ok(None),
        Value::Array(items) if items.iter().all(Value::is_object) => Ok(Some(parsed)),
        Value::Array(_) => {
            Err(row.error("field \"tools\" must be a list of JSON schemas (objects)"))
        }
        other => {
            Err(row.wrong("tools", "a list of JSON schemas, or that list as a JSON string", other))
        }
    }
}

fn template_kwargs(row: &Row) -> Result<Map<String, Value>> {
    match row.get("chat_template_kwargs") {
        None => Ok(Map::new()),
        Some(Value::Object(map)) => Ok(map.clone()),
        Some(other) => Err(row.error(format!(
            "field \"chat_template_kwargs\" must be an object, found {}",
            kind(other)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn parse(text: &str) -> Result<(Format, ParsedRow)> {
        let Value::Object(value) = serde_json::from_str(text).unwrap() else { panic!() };
        let row = Row { value, file: Path::new("r.jsonl").into(), line: 2 };
        let format = Format::detect(&row, "text")?;
        Ok((format, format.parse(&row, "text")?))
    }

    fn said(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn every_type_is_detected() {
        let chat = r#"[{"role":"user","content":"a"}]"#;
        let cases = [
            (r#"{"text":"a"}"#.to_string(), Format::Text),
            (format!(r#"{{"messages":{chat},"tools":"[]"}}"#), Format::Messages),
            (r#"{"prompt":"a","completion":"b"}"#.to_string(), Format::PromptCompletion),
            (format!(r#"{{"prompt":{chat}}}"#), Format::PromptOnly),
            (
                format!(r#"{{"prompt":{chat},"chosen":{chat},"rejected":{chat}}}"#),
                Format::Preference,
            ),
            (r#"{"chosen":"a","rejected":"b"}"#.to_string(), Format::Preference),
            (r#"{"prompt":"a","completion":"b","label":true}"#.to_string(), Format::Unpaired),
        ];
        for (text, format) in cases {
            assert_eq!(parse(&text).unwrap().0, format);
        }
    }

    #[test]
    fn share_gpt_and_alpaca_become_trl_types() {
        let (_, e) =
            parse(r#"{"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"b"}]}"#)
                .unwrap();
        let a = json!({"role":"user","content":"a"});
        let b = json!({"role":"assistant","content":"b"});
        assert_eq!(e.content, RowContent::Messages(vec![a, b.clone()]));
        let (_, e) = parse(r#"{"instruction":"a","input":"c","output":"b"}"#).unwrap();
        let (prompt, completion) = (vec![json!({"role":"user","content":"a\n\nc"})], vec![b]);
        let want = RowContent::PromptCompletion {
            prompt: Content::Chat(prompt),
            completion: Content::Chat(completion),
        };
        assert_eq!(e.content, want);
    }

    #[test]
    fn mistakes_are_told_with_their_place() {
        assert!(
            said(r#"{"promt":"a"}"#)
                .starts_with("r.jsonl:2: the fields \"promt\" match no known kind of row")
        );
        let number = said(r#"{"prompt":3,"completion":"b"}"#);
        assert_eq!(
            number,
            "r.jsonl:2: field \"prompt\" must be a string or a list of messages, found a number"
        );
        assert!(
            said(r#"{"prompt":"a","completion":[{"role":"assistant"}]}"#)
                .contains("make both strings or both messages")
        );
        assert!(said(r#"{"messages":[]}"#).contains("is an empty list"));
        assert!(said(r#"{"messages":"a"}"#).contains("must be a list of messages, found a string"));
        assert!(said(r#"{"messages":[{"content":"a"}]}"#).contains("has no \"role\""));
        assert!(said(r#"{"text":"a","tools":"[1]"}"#).contains("must be a list of JSON schemas"));
        assert!(
            said(r#"{"prompt":"a","completion":"b","label":1}"#)
                .contains("must be true or false, found a number")
        );
    }
}
