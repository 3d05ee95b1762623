//! Run files in YAML or JSON, such as TRL's. Layer 1.
//!
//! Invariant: a file is one mapping of plain values; aliases, depth and size are limited before
//! anything is built from it.

use serde_json::{Map, Value as Json};
use toml::Value as Toml;

use super::value::Given;

/// The options of a YAML text (JSON is a subset of YAML). An error names line and column.
pub(super) fn items(text: &str) -> Result<Vec<(String, Given)>, String> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: 16,
            flow_nesting_limit: 16,
            max_aliases: 64,
            max_anchors: 64,
            max_documents: 1,
            max_nodes: 10_000,
        },
        with_snippet: false,
    };
    let map: Map<String, Json> =
        serde_saphyr::from_str_with_options(text, options).map_err(|e| e.to_string())?;
    Ok(map.into_iter().map(|(key, value)| (key, given(value))).collect())
}

/// A text is treated as on the command line: YAML reads `1e-5` as a text, which is a number here.
fn given(value: Json) -> Given {
    match value {
        Json::String(text) => Given::Text(text),
        Json::Null => Given::Text("none".into()),
        other => Given::File(toml(other)),
    }
}

fn toml(value: Json) -> Toml {
    match value {
        Json::Null => Toml::String("none".into()),
        Json::Bool(b) => Toml::Boolean(b),
        Json::Number(n) => match n.as_i64() {
            Some(i) => Toml::Integer(i),
            None => Toml::Float(n.as_f64().unwrap_or(f64::NAN)), // every option rejects NaN
        },
        Json::String(text) => Toml::String(text),
        Json::Array(items) => Toml::Array(items.into_iter().map(toml).collect()),
        Json::Object(map) => Toml::Table(map.into_iter().map(|(k, v)| (k, toml(v))).collect()),
    }
}
