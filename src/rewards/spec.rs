//! The notations of a reward: `name`, `name:key=value,key=value`, `name:ARGUMENT`, or a table of a
//! run file. Layer 6.
//!
//! Invariant: an unknown name or key is an error that lists the known ones; nothing is guessed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::reward::{Reward, Verifier};
use super::schema::Schema;
use super::worker::Worker;
use crate::error::{Error, Result, nearest};

/// Name, key of its plain argument (empty: it has none), and its other keys.
const KINDS: [(&str, &str, &[&str]); 10] = [
    ("exact_match", "", &["column", "after", "until"]),
    ("numeric_match", "", &["column"]),
    ("regex", "pattern", &[]),
    ("think_format", "", &[]),
    ("json_schema", "file", &[]),
    ("length", "", &["min", "max"]),
    ("soft_overlong", "", &["max_completion_len", "soft_punish_cache"]),
    ("repetition", "", &["ngram_size", "max_penalty"]),
    ("command", "command", &["timeout", "restarts"]),
    ("python", "function", &["timeout", "restarts", "python"]),
];

pub fn known() -> String {
    KINDS
        .map(
            |(name, argument, _)| {
                if argument.is_empty() { name.into() } else { format!("{name}:{argument}") }
            },
        )
        .join(", ")
}

impl Reward {
    /// Parses `exact_match`, `numeric_match:column=solution`, `regex:PATTERN`, `think_format`,
    /// `json_schema:FILE`, `length:min=1,max=200`,
    /// `soft_overlong:max_completion_len=256,soft_punish_cache=64`,
    /// `repetition:ngram_size=3,max_penalty=-1`, `command:CMD`, `python:FILE.py:FUNCTION`, or an
    /// inline table as in [`Reward::from_toml`].
    pub fn parse(spec: &str) -> Result<Reward> {
        if spec.starts_with('{') {
            let table: Result<toml::Table, _> = toml::from_str(&format!("it = {spec}"));
            let table = table.map_err(|e| Error::Config(format!("reward `{spec}`: {e}")))?;
            return table.get("it").map_or_else(
                || Err(Error::Config(format!("reward `{spec}` is not a table"))),
                Reward::from_toml,
            );
        }
        let (kind, rest) = spec.split_once(':').unwrap_or((spec, ""));
        let mut keys = BTreeMap::new();
        if !rest.is_empty() {
            let argument = KINDS.iter().find(|k| k.0 == kind).map_or("", |k| k.1);
            if argument.is_empty() {
                for pair in rest.split(',') {
                    let Some((key, value)) = pair.split_once('=') else {
                        return Err(Error::Config(format!(
                            "reward `{spec}`: `{pair}` is not key=value"
                        )));
                    };
                    keys.insert(key.trim().to_string(), value.trim().to_string());
                }
            } else {
                keys.insert(argument.to_string(), rest.to_string());
            }
        }
        build(kind, keys).map_err(|e| Error::Config(format!("reward `{spec}`: {e}")))
    }

    /// Parses a string as in [`Reward::parse`], or a table `{ kind = "command", command =
    /// "./judge", timeout = 20, weight = 0.5, name = "judge" }`.
    pub fn from_toml(value: &toml::Value) -> Result<Reward> {
        let table = match value {
            toml::Value::String(spec) => return Reward::parse(spec),
            toml::Value::Table(table) => table,
            other => {
                return Err(Error::Config(format!(
                    "a reward must be a string or a table, not {other}"
                )));
            }
        };
        let (mut kind, mut name, mut weight, mut keys) = (None, None, 1.0, BTreeMap::new());
        for (key, value) in table {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
            match key.as_str() {
                "kind" => kind = Some(text),
                "name" => name = Some(text),
                "weight" => weight = number(key, &text)?,
                _ => drop(keys.insert(key.clone(), text)),
            }
        }
        let Some(kind) = kind else {
            return Err(Error::Config(format!(
                "a reward's table needs `kind`; known ones: {}",
                known()
            )));
        };
        let mut reward =
            build(&kind, keys).map_err(|e| Error::Config(format!("reward `{kind}`: {e}")))?;
        reward.name = name.unwrap_or(reward.name);
        reward.weight = weight;
        Ok(reward)
    }
}

fn build(kind: &str, mut keys: BTreeMap<String, String>) -> Result<Reward> {
    let Some((_, argument, more)) = KINDS.iter().find(|k| k.0 == kind) else {
        let near = nearest(kind, KINDS.iter().map(|k| k.0))
            .map(|n| format!(" did you mean `{n}`?"))
            .unwrap_or_default();
        return Err(Error::Config(format!("unknown reward;{near} known ones: {}", known())));
    };
    let takes = |key: &str| more.contains(&key) || (!argument.is_empty() && key == *argument);
    if let Some(wrong) = keys.keys().find(|k| !takes(k)) {
        let all = [&[*argument][..], more]
            .concat()
            .into_iter()
            .filter(|k| !k.is_empty())
            .collect::<Vec<_>>()
            .join(", ");
        return Err(Error::Config(format!("it has no key `{wrong}`; its keys: [{all}]")));
    }
    let mut take = |key: &str| keys.remove(key);
    let column = take("column");
    let mut name = kind.to_string();
    let kind = match kind {
        "exact_match" => {
            Verifier::ExactMatch { column, after: take("after"), until: take("until") }
        }
        "numeric_match" => Verifier::NumericMatch { column },
        "think_format" => Verifier::ThinkFormat,
        "regex" => {
            let pattern = required("pattern", take("pattern"))?;
            let compiled = fancy_regex::Regex::new(&pattern);
            Verifier::Regex {
                pattern: Box::new(compiled.map_err(|e| Error::Config(format!("{pattern}: {e}")))?),
            }
        }
        "json_schema" => Verifier::JsonSchema {
            schema: Schema::read(Path::new(&required("file", take("file"))?))?,
        },
        "length" => {
            let (min, max) =
                (optional("min", take("min"), 0)?, optional("max", take("max"), usize::MAX)?);
            if min > max || (min == 0 && max == usize::MAX) {
                return Err(Error::Config(
                    "give min, max or both, min below max, in tokens".into(),
                ));
            }
            Verifier::Length { min, max }
        }
        "soft_overlong" => {
            let most = required("max_completion_len", take("max_completion_len"))?;
            let cache = required("soft_punish_cache", take("soft_punish_cache"))?;
            let max_completion_len = number("max_completion_len", &most)?;
            Verifier::SoftOverlong {
                max_completion_len,
                soft_punish_cache: number("soft_punish_cache", &cache)?,
            }
        }
        "repetition" => {
            let ngram_size = optional("ngram_size", take("ngram_size"), 3)?;
            let max_penalty: f64 = optional("max_penalty", take("max_penalty"), -1.0)?;
            if ngram_size == 0 || max_penalty > 0.0 {
                return Err(Error::Config(
                    "ngram_size must be at least 1 and max_penalty at most 0".into(),
                ));
            }
            Verifier::Repetition { ngram_size, max_penalty }
        }
        _ => {
            let (timeout, restarts) =
                (seconds(take("timeout"))?, optional("restarts", take("restarts"), 2)?);
            let worker = match take("command") {
                Some(command) => Worker::command(&command, timeout, restarts),
                None => {
                    let target = required("function", take("function"))?;
                    let (file, function) = target.rsplit_once(':').unwrap_or((&target, "reward"));
                    if !PathBuf::from(file).is_file() {
                        return Err(Error::Config(format!(
                            "there is no file {file}; write python:FILE.py:FUNCTION"
                        )));
                    }
                    name = function.to_string();
                    Worker::python(
                        &take("python").unwrap_or("python3".into()),
                        file,
                        function,
                        timeout,
                        restarts,
                    )
                }
            };
            Verifier::Worker(Box::new(worker))
        }
    };
    Ok(Reward { name, weight: 1.0, kind })
}

fn required(key: &str, value: Option<String>) -> Result<String> {
    value.filter(|v| !v.is_empty()).ok_or_else(|| Error::Config(format!("it needs `{key}`")))
}

fn optional<T: std::str::FromStr>(key: &str, value: Option<String>, default: T) -> Result<T> {
    value.map_or(Ok(default), |v| number(key, &v))
}

fn number<T: std::str::FromStr>(key: &str, value: &str) -> Result<T> {
    value.parse().map_err(|_| Error::Config(format!("`{key}` = {value} is not a valid number")))
}

/// The default is 60 s; a judge that needs longer for one row must set `timeout`.
fn seconds(value: Option<String>) -> Result<Duration> {
    let seconds: f64 = optional("timeout", value, 60.0)?;
    Duration::try_from_secs_f64(seconds).ok().filter(|d| !d.is_zero()).ok_or_else(|| {
        Error::Config(format!("`timeout` must be a positive number of seconds, not {seconds}"))
    })
}

#[cfg(test)]
mod tests {
    use super::KINDS;

    #[test]
    fn options_know_the_names_of_all_rewards() {
        assert_eq!(KINDS.map(|kind| kind.0), crate::config::REWARD_NAMES);
    }
}
