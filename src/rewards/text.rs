//! What built-in rewards read in a completion: its text, JSON, reasoning format, length and
//! repetitions. Layer 6.
//!
//! Invariant: `soft_overlong` and `repetition` equal TRL's functions of the token ids, value for
//! value.

use std::collections::HashSet;

use serde_json::Value;

/// The string itself; for messages, the content of the last assistant message (or of the last
/// message) with its text parts joined.
pub fn of(completion: &Value) -> String {
    match completion {
        Value::Array(messages) => {
            let assistant = messages
                .iter()
                .rev()
                .find(|m| m.get("role").and_then(Value::as_str) == Some("assistant"));
            assistant
                .or(messages.last())
                .and_then(|m| m.get("content"))
                .map(plain)
                .unwrap_or_default()
        }
        other => plain(other),
    }
}

/// A cell as text: strings unchanged, message parts joined, other values as JSON.
pub fn plain(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Null => String::new(),
        Value::Array(parts)
            if parts.iter().all(|p| p.get("text").is_some_and(Value::is_string)) =>
        {
            parts.iter().filter_map(|p| p.get("text")?.as_str()).collect()
        }
        other => other.to_string(),
    }
}

/// The text after the last `after`, up to the first `until` behind it; the whole text without
/// either. None: one of them does not occur.
pub fn between<'a>(text: &'a str, after: Option<&str>, until: Option<&str>) -> Option<&'a str> {
    let tail = match after {
        Some(after) => text.rsplit_once(after)?.1,
        None => text,
    };
    match until {
        Some(until) => tail.split_once(until).map(|(head, _)| head),
        None => Some(tail),
    }
}

/// Whether the reasoning is in exactly one `<think>` ... `</think>` at the very beginning, as in
/// TRL's `think_format_reward`.
pub fn has_think_format(text: &str) -> bool {
    text.strip_prefix("<think>")
        .is_some_and(|rest| !rest.contains("<think>") && rest.contains("</think>"))
}

/// The JSON value of a text: of the whole text, or of its last fenced block.
pub fn json(text: &str) -> Option<Value> {
    let whole = serde_json::from_str(text.trim()).ok();
    whole.or_else(|| {
        let (before, _) = text.rsplit_once("```")?;
        let (_, block) = before.rsplit_once("```")?;
        let body = block.strip_prefix("json").unwrap_or(block);
        serde_json::from_str(body.trim()).ok()
    })
}

/// DAPO's length penalty (equation 13 of arXiv 2503.14476), in `-1 ..= 0`.
pub fn soft_overlong(length: usize, max_completion_len: usize, soft_punish_cache: usize) -> f64 {
    let free = max_completion_len as f64 - soft_punish_cache as f64;
    let length = length as f64;
    if length <= free {
        0.0
    } else if length <= max_completion_len as f64 {
        (free - length) / soft_punish_cache as f64
    } else {
        -1.0
    }
}

/// `max_penalty` times the fraction of n-grams of token ids that are repetitions (appendix C.2 of
/// arXiv 2502.03373).
pub fn repetition(ids: &[u32], ngram_size: usize, max_penalty: f64) -> f64 {
    if ids.len() < ngram_size {
        return 0.0;
    }
    let total = ids.len() + 1 - ngram_size;
    let unique: HashSet<&[u32]> = ids.windows(ngram_size).collect();
    let repeated = 1.0 - unique.len() as f64 / total as f64;
    if repeated == 0.0 { 0.0 } else { repeated * max_penalty }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_those_of_trls_functions() {
        // The examples of get_soft_overlong_punishment and get_repetition_penalty_reward, and their
        // edge cases.
        assert_eq!(soft_overlong(90, 100, 20), -0.5);
        assert_eq!([80, 81, 100, 101].map(|n| soft_overlong(n, 100, 20)), [0.0, -0.05, -1.0, -1.0]);
        assert_eq!([100, 101].map(|n| soft_overlong(n, 100, 0)), [0.0, -1.0]);
        assert_eq!(repetition(&[1, 2, 3, 4], 2, -1.0), 0.0);
        assert_eq!(repetition(&[5, 5, 5, 5, 5], 2, -1.0), -0.75);
        assert_eq!(repetition(&[5], 2, -1.0), 0.0);
    }

    #[test]
    fn the_text_of_a_completion_is_that_of_the_last_assistant_message() {
        assert_eq!(of(&json!("hi")), "hi");
        assert_eq!(
            of(&json!([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}])),
            "a"
        );
        assert_eq!(
            of(&json!([{"role": "assistant", "content": [{"type": "text", "text": "x"}]}])),
            "x"
        );
        assert_eq!(of(&json!([{"content": "bare"}])), "bare");
    }

    #[test]
    fn the_think_format_is_one_block_at_the_beginning() {
        assert!(has_think_format("<think>\nwhy\n</think>\nanswer"));
        for wrong in [
            "<think>\nwhy\nanswer",
            " <think>a</think>b",
            "<think>a<think>b</think>c",
            "</think><think>",
        ] {
            assert!(!has_think_format(wrong), "{wrong}");
        }
    }

    #[test]
    fn json_is_read_bare_or_from_a_fence() {
        assert_eq!(json(" {\"a\": 1} "), Some(json!({"a": 1})));
        assert_eq!(json("Here:\n```json\n[1, 2]\n```\nDone."), Some(json!([1, 2])));
        assert_eq!(json("no json"), None);
    }
}
