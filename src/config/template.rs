//! What a run passes to its chat template beside the messages. Layer 1.
//!
//! Invariant: values are JSON, kept whole: what is written into the resolved file reads back
//! unchanged.

use serde_json::{Map, Value as Json};
use toml::Value as Toml;

use super::value::{Given, Value};
use super::{Report, section};

/// A JSON object: a table in a run file, JSON on the command line.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JsonObject(pub Map<String, Json>);

/// A list of JSON objects, in the same syntax.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JsonObjects(pub Vec<Json>);

section! {
    /// What every command that renders conversations gives the chat template.
    pub struct TemplateOptions = "chat template" {
        /// Ours. Tools for the chat template: a list of JSON schemas. A row's own tools replace
        /// them. none: no tools.
        pub tools: Option<JsonObjects> = None,
        /// Ours. Variables for the chat template: a JSON object such as {"enable_thinking": false}.
        /// A row's own variables override them.
        pub chat_template_kwargs: JsonObject = JsonObject::default(),
    }
}

impl TemplateOptions {
    fn rules(&self, _: &mut Report) {}
}

fn json(given: &Given) -> Option<Json> {
    match given {
        Given::Text(text) | Given::File(Toml::String(text)) => serde_json::from_str(text).ok(),
        Given::File(value) => serde_json::to_value(value).ok(),
    }
}

impl Value for JsonObject {
    fn kind() -> String {
        "JSON object".into()
    }
    fn read(given: &Given) -> Result<Self, String> {
        // TRL's default is None.
        if given.is_none() {
            return Ok(JsonObject::default());
        }
        match json(given) {
            Some(Json::Object(map)) => Ok(JsonObject(map)),
            _ => Err("a JSON object, such as '{\"NAME\": 1}'".into()),
        }
    }
    fn written(&self) -> Toml {
        Toml::String(Json::Object(self.0.clone()).to_string())
    }
}

impl Value for JsonObjects {
    fn kind() -> String {
        "JSON list".into()
    }
    fn read(given: &Given) -> Result<Self, String> {
        match json(given) {
            Some(Json::Array(items)) if items.iter().all(Json::is_object) => Ok(JsonObjects(items)),
            _ => Err("a JSON list of objects, such as '[{\"type\": \"function\", ...}]'".into()),
        }
    }
    fn written(&self) -> Toml {
        Toml::String(Json::Array(self.0.clone()).to_string())
    }
}
