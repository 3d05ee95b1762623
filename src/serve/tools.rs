//! Tool calls in the text of a chat's answer. Layer 9.
//!
//! Invariant: text that is not a complete call stays text, byte for byte. A stream and a complete
//! answer report the same.

use serde_json::{Map, Value, json};

use super::names::Served;
use crate::data::tokenizer::Tokenizer;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// Whether the model's template asks for calls as JSON objects between tags (the format of Hermes,
/// Qwen and SmolLM3) and decoded text shows the tags. Other formats stay text.
pub(super) fn reads_calls(served: &Served) -> bool {
    let template = served.text.template.as_ref().and_then(|t| t.pick(true).ok());
    let shown = |tag: &str, tokenizer: &Tokenizer| {
        let id = tokenizer.token_to_id(tag);
        id.is_none_or(|id| tokenizer.added_token(id) != Some(true))
    };
    template.is_some_and(|template| {
        let source = template.source();
        source.contains(OPEN)
            && source.contains("\"arguments\"")
            && !source.contains("<function=")
            && [OPEN, CLOSE].iter().all(|tag| shown(tag, &served.text.tokenizer))
    })
}

/// A call in a choice.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ToolCall {
    /// Index among the calls of its choice.
    pub index: usize,
    pub name: String,
    /// JSON
    pub arguments: String,
}

impl ToolCall {
    /// The call in a message's format, with the id `id`.
    pub fn json(&self, id: &str) -> Value {
        json!({
            "id": id, "type": "function",
            "function": { "name": self.name, "arguments": self.arguments },
        })
    }
}

/// Splits the text of a choice into content and calls while it arrives.
#[derive(Default)]
pub(super) struct CallReader {
    held: String,
    calls: usize,
}

impl CallReader {
    /// Adds text; returns the content and the calls that are complete now.
    pub fn push(&mut self, text: &str) -> (String, Vec<ToolCall>) {
        self.held += text;
        let (mut content, mut calls) = (String::new(), Vec::new());
        while let Some(open) = self.held.find(OPEN) {
            let inside = open + OPEN.len();
            let Some(close) = self.held[inside..].find(CLOSE).map(|at| inside + at) else { break };
            let end = close + CLOSE.len();
            match call(&self.held[inside..close]) {
                Some((name, arguments)) => {
                    // White space before a call only separates it.
                    content += self.held[..open].trim_end();
                    calls.push(ToolCall { index: self.calls, name, arguments });
                    self.calls += 1;
                }
                None => content += &self.held[..end],
            }
            self.held.drain(..end);
        }
        let kept = self.shown();
        content += &self.held[..kept];
        self.held.drain(..kept);
        (content, calls)
    }

    /// The remaining content at the end.
    pub fn finish(&mut self) -> String {
        let rest = std::mem::take(&mut self.held);
        match self.calls > 0 && rest.trim().is_empty() {
            true => String::new(),
            false => rest,
        }
    }

    pub fn made_calls(&self) -> bool {
        self.calls > 0
    }

    /// Number of bytes of `held` that cannot become part of a call, or of the white space before
    /// one.
    fn shown(&self) -> usize {
        let held = &self.held;
        let open = held.find(OPEN).unwrap_or_else(|| {
            let begins = |at: &usize| OPEN.starts_with(&held[*at..]);
            held.char_indices().map(|(at, _)| at).find(begins).unwrap_or(held.len())
        });
        held[..open].trim_end().len()
    }
}

/// Name and arguments of a call. None: the text is not a call.
fn call(text: &str) -> Option<(String, String)> {
    let call: Map<String, Value> = serde_json::from_str(text.trim()).ok()?;
    let (name, arguments) = (call.get("name")?.as_str()?, call.get("arguments")?);
    arguments.is_object().then(|| (name.to_string(), arguments.to_string()))
}

/// Converts the arguments of the calls in `message` from text to objects: OpenAI's clients send
/// text, but templates expect objects.
pub(super) fn arguments_to_objects(message: &mut Value) {
    let Some(calls) = message.get_mut("tool_calls").and_then(Value::as_array_mut) else { return };
    for call in calls {
        let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
        let read: Option<Value> = arguments.as_str().and_then(|t| serde_json::from_str(t).ok());
        if let Some(object) = read.filter(Value::is_object) {
            *arguments = object;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Content and calls of a text that arrives in pieces of `n` characters.
    fn read(text: &str, n: usize) -> (String, Vec<(String, String)>) {
        let (mut reader, mut content, mut calls) =
            (CallReader::default(), String::new(), Vec::new());
        let chars: Vec<char> = text.chars().collect();
        for piece in chars.chunks(n) {
            let (text, new) = reader.push(&piece.iter().collect::<String>());
            content += &text;
            for call in new {
                assert_eq!(call.index, calls.len());
                calls.push((call.name, call.arguments));
            }
        }
        (content + &reader.finish(), calls)
    }

    #[test]
    fn calls_are_read_however_the_text_is_cut() {
        let one = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": \"é\"}}\n</tool_call>";
        let two = "<tool_call>{\"arguments\": {}, \"name\": \"now\"}</tool_call>";
        let add = ("add".to_string(), "{\"a\":1,\"b\":\"é\"}".to_string());
        let now = ("now".to_string(), "{}".to_string());
        for (text, content, calls) in [
            (one.to_string(), "", vec![add.clone()]),
            (format!("Let me see.\n\n{one}\n{two}\n"), "Let me see.", vec![add, now.clone()]),
            (format!("{two} and so on "), " and so on", vec![now]),
            ("no call at all \n".into(), "no call at all \n", vec![]),
            ("a < b <tool <tool_call".into(), "a < b <tool <tool_call", vec![]),
            (
                "x\n<tool_call>{\"name\": 1}</tool_call>\n".into(),
                "x\n<tool_call>{\"name\": 1}</tool_call>\n",
                vec![],
            ),
            ("<tool_call>{\"name\": \"cut\"".into(), "<tool_call>{\"name\": \"cut\"", vec![]),
            (
                "<tool_call>{\"name\": \"f\", \"arguments\": \"text\"}</tool_call>".into(),
                "<tool_call>{\"name\": \"f\", \"arguments\": \"text\"}</tool_call>",
                vec![],
            ),
        ] {
            for n in 1..=text.chars().count() {
                assert_eq!(read(&text, n), (content.to_string(), calls.clone()), "{text:?} by {n}");
            }
        }
    }

    #[test]
    fn arguments_that_are_no_object_stay_as_they_are() {
        let mut message = json!({ "tool_calls": [
            { "function": { "name": "f", "arguments": "{\"a\": [1]}" } },
            { "function": { "name": "f", "arguments": "not JSON" } },
            { "function": { "name": "f" } },
        ] });
        arguments_to_objects(&mut message);
        let of = |i: usize| message["tool_calls"][i]["function"]["arguments"].clone();
        assert_eq!([of(0), of(1), of(2)], [json!({ "a": [1] }), json!("not JSON"), Value::Null]);
    }
}
