//! Multiple-choice questions by log-likelihood: `acc` and `acc_norm`. Layer 6.
//!
//! Invariant: the metrics are lm-eval's. The score of a choice is the sum of the log-probs of its
//! tokens after the question; `acc` takes the highest score, `acc_norm` the highest score per byte
//! of the choice's text; the first of equal ones wins. The examples before a question are a
//! function of (seed, row number, file of examples).

use serde_json::Value;

use super::options::EvalOptions;
use super::result::{EvalMetric, EvalRow, Evaluation};
use super::score::{RowScore, score};
use crate::autograd::Cx;
use crate::config::{EvalConfig, ScoredChoice};
use crate::data::bad::BadRows;
use crate::data::masked::MaskedSequence;
use crate::data::order::permutation;
use crate::data::render::{ModelText, Renderer};
use crate::data::rows::{Row, kind};
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::rng::seed;

/// Separators between a question and its answer, and between examples.
const BEFORE_ANSWER: &str = " ";
const BETWEEN_SHOTS: &str = "\n\n";

/// Whether the rows are multiple-choice questions.
pub fn are_questions(rows: &[Row]) -> bool {
    rows.iter().any(|row| row.has("question") && row.has("choices"))
}

/// The question of a row.
#[derive(Clone, Debug, PartialEq)]
struct Question {
    text: String,
    choices: Vec<String>,
    answer: usize,
}

impl Question {
    /// Reads `question`, `choices` and `answer`. The error says what is wrong with the row.
    fn of(row: &Row) -> Result<Question> {
        let text = row.string("question")?.to_string();
        let (choices, labels) = choices(row)?;
        if choices.len() < 2 {
            return Err(row.error(format!(
                "field \"choices\" has {} choice; give two or more",
                choices.len()
            )));
        }
        if let Some(i) = choices.iter().position(String::is_empty) {
            return Err(row.error(format!("choice {} in \"choices\" is an empty text", i + 1)));
        }
        let answer = answer(row, choices.len(), &labels)?;
        Ok(Question { text, choices, answer })
    }

    /// The formatted question without its answer.
    fn written(&self, eval: &EvalConfig) -> String {
        let lines: Vec<String> =
            self.choices.iter().enumerate().map(|(i, c)| format!("{}. {c}", letter(i))).collect();
        // A single pass over the format, so that braces in a question stay unchanged.
        let mut out = String::new();
        let format = eval.question_format.replace("\\n", "\n");
        let mut rest = format.as_str();
        while let Some(at) = rest.find('{') {
            out += &rest[..at];
            rest = &rest[at..];
            let fields = [("{question}", self.text.clone()), ("{choices}", lines.join("\n"))];
            match fields.iter().find(|(name, _)| rest.starts_with(name)) {
                Some((name, value)) => {
                    out += value;
                    rest = &rest[name.len()..];
                }
                None => {
                    out.push('{');
                    rest = &rest[1..];
                }
            }
        }
        out + rest
    }

    /// The text that is scored for each choice.
    fn answers(&self, scored: ScoredChoice) -> Vec<String> {
        match scored {
            ScoredChoice::Text => self.choices.clone(),
            ScoredChoice::Letter => (0..self.choices.len()).map(letter).collect(),
        }
    }

    /// The question with the right answer, as a few-shot example.
    fn shot(&self, eval: &EvalConfig) -> String {
        let answer = &self.answers(eval.scored_choice)[self.answer];
        format!("{}{BEFORE_ANSWER}{answer}{BETWEEN_SHOTS}", self.written(eval))
    }
}

/// The texts of the choices and their labels, if any: from a list of texts, a list of objects, or
/// an object with two lists, as in ARC.
fn choices(row: &Row) -> Result<(Vec<String>, Vec<String>)> {
    let value = row.need("choices")?;
    let texts = |value: &Value, what: &str| -> Result<Vec<String>> {
        let text = |v: &Value| match v {
            Value::String(text) => Some(text.clone()),
            Value::Number(n) => Some(n.to_string()),
            _ => None,
        };
        let items = value.as_array().map(|items| items.iter().map(text).collect::<Option<_>>());
        items.flatten().ok_or_else(|| row.wrong(what, "a list of texts", value))
    };
    let labelled = |text: Vec<String>, label: Vec<String>| match text.len() == label.len() {
        true => Ok((text, label)),
        false => Err(row.error(format!(
            "field \"choices\" has {} texts and {} labels",
            text.len(),
            label.len()
        ))),
    };
    match value {
        Value::Object(map) => {
            let Some(text) = map.get("text") else {
                return Err(row.error("field \"choices\" is an object without \"text\""));
            };
            let text = texts(text, "choices.text")?;
            match map.get("label").filter(|label| !label.is_null()) {
                Some(label) => labelled(text, texts(label, "choices.label")?),
                None => Ok((text, Vec::new())),
            }
        }
        Value::Array(items) if items.first().is_some_and(Value::is_object) => {
            let column = |name: &str| {
                items.iter().map(|item| item.get(name).cloned().unwrap_or(Value::Null)).collect()
            };
            let text = texts(&Value::Array(column("text")), "choices[].text")?;
            let label = column("label");
            match label.iter().all(Value::is_null) {
                true => Ok((text, Vec::new())),
                false => labelled(text, texts(&Value::Array(label), "choices[].label")?),
            }
        }
        _ => Ok((texts(value, "choices")?, Vec::new())),
    }
}

/// The index of the right choice, from a label, a number from 0, or a letter.
fn answer(row: &Row, n: usize, labels: &[String]) -> Result<usize> {
    let Some(value) = row.get("answer") else {
        return Err(row
            .error("has no field \"answer\"; name the column that has it: columns=answer:COLUMN"));
    };
    let text = match value {
        Value::String(text) => text.trim().to_string(),
        Value::Number(number) => number.to_string(),
        other => {
            return Err(row.error(format!(
                "field \"answer\" must be the number, letter or label of a choice, found {}",
                kind(other)
            )));
        }
    };
    let by_label = labels.iter().position(|label| label.trim() == text);
    let by_number = || text.parse::<usize>().ok().filter(|i| *i < n);
    let by_letter = || (0..n).find(|i| letter(*i) == text);
    let found = match labels.is_empty() {
        true => by_number().or_else(by_letter),
        false => by_label,
    };
    found.ok_or_else(|| {
        let known = match labels.is_empty() {
            true => format!("0 to {}, or A to {}", n - 1, letter(n - 1)),
            false => labels.join(", "),
        };
        row.error(format!("field \"answer\" is {text:?}, which is none of its choices ({known})"))
    })
}

/// A, B, C, ...; after Z: AA, AB, ...
fn letter(i: usize) -> String {
    let last = char::from(b'A' + (i % 26) as u8);
    if i < 26 { last.to_string() } else { format!("{}{last}", letter(i / 26 - 1)) }
}

/// The few-shot examples for question `row`: `num_fewshot` of `shots`, never the question itself.
fn shots(question: &Question, row: usize, shots: &[Question], options: &EvalOptions) -> String {
    let order = permutation(shots.len(), options.generate.seed ^ seed::SHOTS, row as u32);
    let others = order.into_iter().map(|i| &shots[i]).filter(|shot| *shot != question);
    others.take(options.eval.num_fewshot).map(|shot| shot.shot(&options.eval)).collect()
}

/// The tokens of a context and its continuation; the targets are those of the continuation. As in
/// lm-eval, the tokens of both together are split at the length of the context's own tokens.
fn sequence(
    renderer: &Renderer,
    row: &Row,
    context: &str,
    continuation: &str,
) -> Result<MaskedSequence> {
    let alone = renderer.encode(row, context, true)?.len();
    let whole = renderer.encode(row, &format!("{context}{continuation}"), true)?;
    if alone >= whole.len() || alone == 0 {
        return Err(row.error(format!(
            "the choice {:?} has no tokens of its own after its question",
            continuation.trim()
        )));
    }
    Ok(MaskedSequence::new(&whole[..alone], &whole[alone..]))
}

/// `acc` and `acc_norm` of a language model on questions; few-shot examples come from `examples`.
/// Errors: rows are not questions; there are too few examples.
pub fn choose(
    cx: &mut Cx,
    model: &mut Decoder,
    text: &ModelText,
    rows: &[Row],
    examples: &[Row],
    options: &EvalOptions,
) -> Result<Evaluation> {
    let (eval, mut bad) = (&options.eval, BadRows::new(options.data.on_bad_row));
    let mut unused = BadRows::new(options.data.on_bad_row);
    let known: Vec<Question> =
        unused.filter(examples, Question::of)?.into_iter().map(|(_, shot)| shot).collect();
    let renderer = text.renderer(model.config.vocab_size);
    let numbered: Vec<(usize, &Row)> = rows.iter().enumerate().collect();
    let made = bad.filter(&numbered, |(i, row)| {
        let question = Question::of(row)?;
        let before = shots(&question, *i, &known, options);
        let others = known.iter().filter(|shot| **shot != question).count();
        if others < eval.num_fewshot {
            return Err(Error::Config(format!(
                "num_fewshot = {}: fewshot_data has {others} questions beside {}; give more of them, or a lower number",
                eval.num_fewshot,
                row.place()
            )));
        }
        let context = before + &question.written(eval);
        let answers = question.answers(eval.scored_choice);
        let sequences = answers
            .iter()
            .map(|a| sequence(&renderer, row, &context, &format!("{BEFORE_ANSWER}{a}")))
            .collect::<Result<Vec<_>>>()?;
        Ok((question.answer, answers, sequences))
    })?;
    let (questions, sequences): (Vec<_>, Vec<_>) =
        made.into_iter().map(|(_, (answer, texts, own))| ((answer, texts), own)).unzip();
    let mut sums = Vec::new();
    score(cx, model, &sequences.concat(), options.batch_tokens, &mut |row| {
        if let RowScore::Tokens { sum, .. } = row {
            sums.push(sum);
        }
        Ok(())
    })?;
    let mut rest = sums.as_slice();
    let (mut acc, mut acc_norm, mut found) = (Vec::new(), Vec::new(), Vec::new());
    for (answer, texts) in questions {
        let (own, tail) = rest.split_at(texts.len());
        rest = tail;
        let a_byte: Vec<f64> = own.iter().zip(&texts).map(|(s, t)| s / t.len() as f64).collect();
        let (chosen, chosen_norm) = (highest(own), highest(&a_byte));
        acc.push(f64::from(u8::from(chosen == answer)));
        acc_norm.push(f64::from(u8::from(chosen_norm == answer)));
        found.push(EvalRow::Choices { logps: own.to_vec(), answer, chosen, chosen_norm });
    }
    Ok(Evaluation {
        metrics: vec![EvalMetric::mean("acc", &acc), EvalMetric::mean("acc_norm", &acc_norm)],
        rows: found,
        skipped: Vec::new(),
        bad,
    })
}

/// The index of the first maximum.
fn highest(values: &[f64]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn question(text: &str) -> Result<Question> {
        let value = serde_json::from_str(text).unwrap();
        Question::of(&Row { value, file: Path::new("q.jsonl").into(), line: 4 })
    }

    #[test]
    fn answers_are_numbers_letters_or_labels() {
        let of = |text: &str| question(text).unwrap().answer;
        let plain = |answer: &str| {
            of(&format!(r#"{{"question": "q", "choices": ["a", "b", "c"], "answer": {answer}}}"#))
        };
        assert_eq!([plain("2"), plain("\"1\""), plain("\"B\""), plain("\"0\"")], [2, 1, 1, 0]);
        let arc = r#"{"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answer": "2"}"#;
        assert_eq!(of(arc), 1);
        let objects = r#"{"question": "q", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}], "answer": "B"}"#;
        assert_eq!(question(objects).unwrap().choices, ["a", "b"]);
        assert_eq!((letter(25), letter(26), letter(52)), ("Z".into(), "AA".into(), "BA".into()));
    }

    #[test]
    fn what_is_wrong_with_a_question_is_said_with_its_place() {
        let said = |text: &str| question(text).unwrap_err().to_string();
        let of = |choices: &str, answer: &str| {
            said(&format!(r#"{{"question": "q", "choices": {choices}, "answer": {answer}}}"#))
        };
        assert_eq!(
            of(r#"["a", "b"]"#, "2"),
            "q.jsonl:4: field \"answer\" is \"2\", which is none of its choices (0 to 1, or A to B)"
        );
        assert!(of(r#"["a"]"#, "0").contains("give two or more"));
        assert!(of(r#"["a", ""]"#, "0").contains("choice 2 in \"choices\" is an empty text"));
        assert!(of(r#"["a", null]"#, "0").contains("must be a list of texts"));
        assert!(
            of(r#"{"text": ["a", "b"], "label": ["A"]}"#, "\"A\"").contains("2 texts and 1 labels")
        );
        assert!(of(r#"["a", "b"]"#, "[0]").contains("found a list"));
        assert!(
            said(r#"{"question": "q", "choices": ["a", "b"], "label": 1}"#)
                .contains("columns=answer:COLUMN")
        );
    }

    #[test]
    fn braces_of_a_question_stay_as_they_are() {
        let q = question(r#"{"question": "{choices} {x", "choices": ["a", "b"], "answer": 1}"#)
            .unwrap();
        let format = |text: &str| EvalConfig { question_format: text.into(), ..Default::default() };
        assert_eq!(q.written(&format("{question}|{y}\n{choices}")), "{choices} {x|{y}\nA. a\nB. b");
        let eval = EvalConfig { scored_choice: ScoredChoice::Letter, ..format("{question}:") };
        assert_eq!(q.shot(&eval), "{choices} {x: B\n\n");
    }
}
