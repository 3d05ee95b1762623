//! The option type for a list of rewards: texts, or tables of a run file. Layer 1.
//!
//! Invariant: a comma ends a reward only if another reward's name follows it, so that
//! `length:min=1,max=200` and `regex:a{1,3}` are one reward each.

use std::ops::Deref;

use toml::Value as Toml;

use super::value::{Given, Value};
use crate::error::nearest;

/// The names of rewards. `rewards::spec` defines the arguments of each; a test compares the two.
pub const REWARD_NAMES: [&str; 10] = [
    "exact_match",
    "numeric_match",
    "regex",
    "think_format",
    "json_schema",
    "length",
    "soft_overlong",
    "repetition",
    "command",
    "python",
];

/// Rewards as they were given; a table is kept as an inline table of TOML.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RewardSpecs(pub Vec<String>);

impl Deref for RewardSpecs {
    type Target = Vec<String>;
    fn deref(&self) -> &Vec<String> {
        &self.0
    }
}

impl From<Vec<String>> for RewardSpecs {
    fn from(specs: Vec<String>) -> Self {
        RewardSpecs(specs)
    }
}

impl Value for RewardSpecs {
    fn kind() -> String {
        "list of rewards".into()
    }

    fn read(given: &Given) -> Result<Self, String> {
        let expected = "rewards, each a text or a table { kind = \"command\", ... }";
        let one = |value: &Toml| match value {
            Toml::String(text) => Ok(text.clone()),
            Toml::Table(_) => Ok(value.to_string()),
            _ => Err(expected.to_string()),
        };
        match given {
            Given::File(Toml::Array(list)) => list.iter().map(one).collect::<Result<_, _>>(),
            Given::File(value) => one(value).map(|spec| vec![spec]),
            Given::Text(text) if text.trim().is_empty() => Ok(Vec::new()),
            Given::Text(text) if text.trim_start().starts_with(['{', '[']) => {
                let table: Result<toml::Table, _> = toml::from_str(&format!("it = {text}"));
                let value = table.ok().and_then(|mut table| table.remove("it"));
                let value = value.ok_or_else(|| format!("{expected}; it is not valid TOML"))?;
                return Self::read(&Given::File(value));
            }
            Given::Text(text) => Ok(split(text)),
        }
        .map(RewardSpecs)
    }

    fn written(&self) -> Toml {
        let one = |spec: &String| match spec.starts_with('{') {
            true => toml::from_str::<toml::Table>(&format!("it = {spec}"))
                .ok()
                .and_then(|mut table| table.remove("it"))
                .unwrap_or_else(|| Toml::String(spec.clone())),
            false => Toml::String(spec.clone()),
        };
        Toml::Array(self.iter().map(one).collect())
    }
}

fn split(text: &str) -> Vec<String> {
    let mut specs: Vec<String> = Vec::new();
    for piece in text.split(',') {
        let name = piece.split(':').next().unwrap_or_default().trim();
        // A misspelled name begins a reward too: its error suggests the right one.
        let begins = nearest(name, REWARD_NAMES).is_some();
        match specs.last_mut().filter(|_| !begins) {
            Some(last) => *last = format!("{last},{piece}"),
            None => specs.push(piece.into()),
        }
    }
    specs.into_iter().map(|spec| spec.trim().to_string()).collect()
}
