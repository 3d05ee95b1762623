//! What a run was made from, as digests that every checkpoint carries. Layer 8.
//!
//! Invariant: contents are compared, never paths: a moved folder with the same contents continues,
//! another one under the old name does not.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::config::Key;
use crate::data::chat::ChatTemplate;
use crate::data::tokenizer::Tokenizer;
use crate::digest::{self, Digest};
use crate::error::{Error, Result};
use crate::fsio;
use crate::methods::offline::rows::Split;
use crate::methods::{Method, MethodRun};
use crate::rewards::RewardFunction;

/// Its name in a checkpoint.
pub const FILE: &str = "inputs.json";

/// Options that name a folder with a model, and what an error calls it.
const MODELS: [(&str, &str); 3] = [
    ("ref_model", "reference model"),
    ("teacher_model_name_or_path", "teacher model"),
    ("reward_model", "reward model"),
];

/// The files that say how a reward model reads a completion.
const REWARD_TOKENIZER: &str = "tokenizer of the reward model";

/// One input: its digest, and what a message says of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Input {
    digest: String,
    shown: String,
}

/// Everything that a run reads, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunInputs {
    inputs: BTreeMap<String, Input>,
    /// Rewards and an environment may change: a resumed run warns.
    rewards: BTreeMap<String, Input>,
}

/// What differs from the run that is resumed, a line each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The resumed run would not be the uninterrupted one.
    pub inputs: Vec<String>,
    /// Worth a warning.
    pub rewards: Vec<String>,
}

impl RunInputs {
    /// Digests of what a run reads; models are read once, by all threads. Error: a file cannot be
    /// read.
    pub fn of(
        run: &MethodRun,
        model: &Path,
        adapter: Option<&Path>,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        method: &dyn Method,
        functions: &[RewardFunction],
    ) -> Result<RunInputs> {
        let mut all = RunInputs::default();
        for (split, name, count) in [
            (Split::Train, "training rows", method.rows()),
            (Split::Eval, "evaluation rows", method.eval_rows()),
        ] {
            let mut digest = Digest::default();
            method.digest_rows(split, &mut digest)?;
            all.input(name, digest.finish(), format!("{count} rows"));
        }
        let vocabulary = digest::file(&tokenizer.dir().join("tokenizer.json"))?;
        all.input("tokenizer", vocabulary, "tokenizer.json".into());
        let special = serde_json::Value::Object(tokenizer.special_tokens().clone()).to_string();
        all.input("special tokens", of_text(&special), special);
        if let Some(template) = template {
            let (source, from) = (template.source(), template.origin().display().to_string());
            all.input("chat template", of_text(source), from);
        }
        all.folder("model", model)?;
        if let Some(dir) = adapter {
            all.folder("adapter", dir)?;
        }
        let keys: Vec<Key> = run.sections().iter().flat_map(|s| s.keys()).collect();
        for (option, name) in MODELS {
            let value = keys.iter().find(|k| k.name == option).and_then(|k| k.value.as_str());
            if let Some(dir) = value.filter(|v| *v != "none") {
                let dir = crate::model::hub::resolve_model(dir)?;
                all.folder(name, &dir)?;
                // A reward model reads completions as its own tokenizer and template write them.
                if option == "reward_model" {
                    all.tokenizer(REWARD_TOKENIZER, &dir)?;
                }
            }
        }
        let rewards = keys.iter().find(|k| k.name == "reward_funcs");
        for spec in rewards.and_then(|k| k.value.as_array()).into_iter().flatten() {
            all.reward(spec)?;
        }
        let environment = keys.iter().find(|k| k.name == "environment");
        if let Some(command) = environment.and_then(|k| k.value.as_str()).filter(|c| *c != "none") {
            all.environment(command)?;
        }
        for function in functions {
            let name = function.name().to_string();
            all.rewards.insert(
                name.clone(),
                Input { digest: String::new(), shown: "a function of the program".into() },
            );
        }
        Ok(all)
    }

    /// Reads what a checkpoint carries. None: it is of a version that did not write it.
    pub fn read(checkpoint: &Path) -> Result<Option<RunInputs>> {
        let path = checkpoint.join(FILE);
        if !path.is_file() {
            return Ok(None);
        }
        let inputs = serde_json::from_slice(&fsio::read(&path)?);
        inputs.map(Some).map_err(|e| Error::checkpoint(&path, e.to_string()))
    }

    /// As a file of a checkpoint.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let text = serde_json::to_string_pretty(self);
        let text = text.map_err(|e| Error::Run(format!("{FILE}: {e}")))?;
        Ok(format!("{text}\n").into_bytes())
    }

    /// What is not as it was in `old`.
    pub fn changes_from(&self, old: &RunInputs) -> Changes {
        let mut inputs = self.inputs.clone();
        // Earlier versions did not write it.
        if old.inputs.contains_key("reward model") && !old.inputs.contains_key(REWARD_TOKENIZER) {
            inputs.remove(REWARD_TOKENIZER);
        }
        Changes {
            inputs: differences(&old.inputs, &inputs),
            rewards: differences(&old.rewards, &self.rewards),
        }
    }

    fn input(&mut self, name: &str, digest: String, shown: String) {
        self.inputs.insert(name.into(), Input { digest, shown });
    }

    fn folder(&mut self, name: &str, dir: &Path) -> Result<()> {
        self.input(name, digest::model_folder(dir)?, dir.display().to_string());
        Ok(())
    }

    /// The files of a model's own tokenizer, its chat template among them.
    fn tokenizer(&mut self, name: &str, dir: &Path) -> Result<()> {
        let mut digest = Digest::default();
        for file in Tokenizer::of_model(dir, None)?.files() {
            digest.text(file.file_name().and_then(|n| n.to_str()).unwrap_or_default());
            digest.text(&digest::file(file)?);
        }
        self.input(name, digest.finish(), dir.display().to_string());
        Ok(())
    }

    /// A reward's own text, and the file that it names: a Python file or a schema.
    fn reward(&mut self, spec: &toml::Value) -> Result<()> {
        let text = spec.as_str().map_or_else(|| spec.to_string(), str::to_string);
        let named: Vec<&str> = match spec {
            toml::Value::Table(table) => table.values().filter_map(toml::Value::as_str).collect(),
            _ => vec![text.as_str()],
        };
        let mut digest = Digest::default();
        digest.text(&text);
        for part in named.iter().flat_map(|t| t.split(':')) {
            let path = Path::new(part);
            if path.is_file() {
                digest.text(&digest::file(path)?);
            }
        }
        self.rewards.insert(text.clone(), Input { digest: digest.finish(), shown: text });
        Ok(())
    }

    /// The command of an environment, and the files that it names.
    fn environment(&mut self, command: &str) -> Result<()> {
        let mut digest = Digest::default();
        digest.text(command);
        for path in command.split_whitespace().map(Path::new).filter(|path| path.is_file()) {
            digest.text(&digest::file(path)?);
        }
        let input = Input { digest: digest.finish(), shown: command.into() };
        self.rewards.insert("environment".into(), input);
        Ok(())
    }
}

fn of_text(text: &str) -> String {
    let mut digest = Digest::default();
    digest.text(text);
    digest.finish()
}

fn differences(old: &BTreeMap<String, Input>, new: &BTreeMap<String, Input>) -> Vec<String> {
    let names: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let line = |name: &String| match (old.get(name), new.get(name)) {
        (Some(a), Some(b)) if a.digest == b.digest => None,
        (Some(a), Some(b)) if a.shown == b.shown => {
            Some(format!("{name}: the contents have changed ({})", b.shown))
        }
        (Some(a), Some(b)) => Some(format!("{name}: was {}, is now {}", a.shown, b.shown)),
        (Some(a), None) => Some(format!("{name}: was {}, is now none", a.shown)),
        (None, Some(b)) => Some(format!("{name}: was none, is now {}", b.shown)),
        (None, None) => None,
    };
    names.into_iter().filter_map(line).collect()
}
