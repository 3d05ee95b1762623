//! The options of a run as a YAML file for TRL's commands. Layer 1.
//!
//! Invariant: TRL 1.16.0's parser accepts the file, and read back here it gives the same options,
//! except those that TRL does not have; these become comments that say what they change.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use toml::Value as Toml;

use super::{Key, Report, Section};
use crate::error::{Error, Result};

/// The commands of TRL 1.16.0 that correspond to ours.
const COMMANDS: [&str; 6] = ["sft", "dpo", "reward", "kto", "grpo", "rloo"];

/// Options that no command of TRL has.
const OURS: &[&str] = &[
    "eval_rows",
    "device",
    "matmul",
    "attention",
    "resume_with_changes",
    "compat",
    "tools",
    "columns",
    "on_bad_row",
    "max_row_bytes",
    "peft_type",
    "bias",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "loraplus_lr_ratio",
    "ensure_weight_tying",
    "feedforward_modules",
    "num_virtual_tokens",
    "prompt_tuning_init_text",
    "reduction_factor",
    "non_linearity",
    "freeze",
    "lr_multipliers",
    "on_truncation",
    "reference_free",
    "ref_model",
    "dynamic_sampling",
    "reward_env",
    "reward_model",
    "max_sequences",
    "environment",
    "environment_timeout",
    "environment_restarts",
    "data",
    "stopping_strategy",
    "data_cache",
    "early_stopping_patience",
    "early_stopping_threshold",
    "sample_prompts",
    "sample_max_new_tokens",
    "muon_learning_rate",
    "muon_momentum",
    "muon_nesterov",
    "muon_ns_steps",
    "muon_adjust_lr_fn",
];

/// Options that only some commands of TRL have.
const SOME: &[(&str, &[&str])] = &[
    ("chat_template_path", &["sft", "reward"]),
    ("disable_dropout", &["dpo", "reward", "kto", "grpo", "rloo"]),
    ("chat_template_kwargs", &["grpo", "rloo"]),
    ("assistant_only_loss", &["sft"]),
    ("max_tool_calling_iterations", &["grpo"]),
    ("reward_funcs", &[]), // an argument of the script, with its own names
];

/// Whether the command of TRL has the option under our name.
pub fn has_trl_key(command: &str, key: &str) -> bool {
    match SOME.iter().find(|(name, _)| *name == key) {
        Some((_, commands)) => commands.contains(&command),
        None => !OURS.contains(&key),
    }
}

/// The model, rows and output folder of a run.
pub struct TrlFiles<'a> {
    pub model: &'a str,
    pub data: &'a [PathBuf],
    pub eval_data: &'a [PathBuf],
    pub output: &'a Path,
}

/// The file for `trl COMMAND --config FILE`. `defaults`: the options at their defaults. Error if
/// TRL has no such command, or no equivalent of an option's value.
pub fn to_trl(
    command: &str,
    sections: &[&dyn Section],
    defaults: &[&dyn Section],
    files: &TrlFiles,
) -> Result<String> {
    let trl = if command == "pretrain" { "sft" } else { command };
    if !COMMANDS.contains(&trl) {
        return Err(Error::Config(format!(
            "--write-trl: TRL 1.16.0 has no command for {command}; it has {}",
            COMMANDS.join(", ")
        )));
    }
    let mut report = Report::default();
    sections.iter().for_each(|s| s.check(&mut report));
    let keys: Vec<Key> = sections.iter().flat_map(|s| s.keys()).collect();
    let defaults: Vec<Key> = defaults.iter().flat_map(|s| s.keys()).collect();
    let mut file = TrlFile { command: trl, keys: &keys, yaml: String::new(), notes: String::new() };
    file.head(files);
    for key in &keys {
        let default = defaults.iter().find(|d| d.name == key.name).map(|d| &d.value);
        if !report.idle.contains_key(key.name) {
            file.option(key, default == Some(&key.value))?;
        }
    }
    if trl == "reward" && file.is("use_peft", "true") {
        file.line("lora_task_type", "SEQ_CLS");
    }
    let head = format!("# trl {trl} --config FILE (TRL 1.16.0); written by temper {command}\n");
    Ok(format!("{head}{}{}", file.yaml, file.notes))
}

struct TrlFile<'a> {
    command: &'a str,
    keys: &'a [Key],
    yaml: String,
    notes: String,
}

impl TrlFile<'_> {
    fn line(&mut self, key: &str, value: &str) {
        let _ = writeln!(self.yaml, "{key}: {value}"); // writing to a String cannot fail
    }

    fn note(&mut self, text: &str) {
        let _ = writeln!(self.notes, "# {text}");
    }

    fn value(&self, key: &str) -> Option<&Toml> {
        self.keys.iter().find(|k| k.name == key).map(|k| &k.value)
    }

    fn is(&self, key: &str, shown: &str) -> bool {
        self.value(key).is_some_and(|value| value.to_string().trim_matches('"') == shown)
    }

    /// Writes model, rows and output.
    fn head(&mut self, files: &TrlFiles) {
        self.line("model_name_or_path", &quoted(files.model));
        self.line("output_dir", &quoted(&files.output.display().to_string()));
        let list: Vec<String> =
            files.data.iter().map(|file| quoted(&file.display().to_string())).collect();
        let _ = writeln!(
            self.yaml,
            "datasets:\n- path: {}\n  data_files: [{}]",
            quoted(builder(files.data)),
            list.join(", ")
        );
        let evaluates = !self.is("eval_strategy", "no");
        let rows = self.value("eval_rows").and_then(Toml::as_float).filter(|share| *share > 0.0);
        if !files.eval_data.is_empty() {
            self.note(
                "--eval-data: TRL's command takes evaluation rows only from a split of the data set; eval_strategy is no here",
            );
        } else if let (true, Some(share)) = (evaluates, rows) {
            self.line("test_split_size", &share.to_string());
            self.note(
                "eval_rows: temper takes the last rows of the files, TRL takes rows at random",
            );
        } else if evaluates {
            self.note("eval_rows: TRL takes a share of the rows (test_split_size); eval_strategy is no here");
        }
    }

    /// Whether TRL gets rows for evaluation.
    fn evaluates(&self) -> bool {
        self.yaml.contains("\ntest_split_size:")
    }

    fn option(&mut self, key: &Key, is_default: bool) -> Result<()> {
        let shown = key.value.to_string();
        let word = shown.trim_matches('"');
        let online = ["grpo", "rloo"].contains(&self.command);
        let unlike =
            |what: &str| Err(Error::Config(format!("--write-trl: {} = {shown}: {what}", key.name)));
        match (key.name, word) {
            ("dtype", "bfloat16") => self.line("bf16", "true"),
            ("dtype", "float32") => self.line("bf16", "false"),
            ("dtype", _) => {
                self.note("dtype = \"auto\": bfloat16 on a GPU, as TRL's default; float32 on a CPU")
            }
            ("device", "cpu") => self.line("use_cpu", "true"),
            ("gradient_checkpointing", "auto" | "light") => {} // changes no number; TRL: true
            ("optim", "adamw" | "adamw_8bit") => {
                self.line("optim", if word == "adamw" { "adamw_torch" } else { "adamw_8bit" });
            }
            ("optim", _) => {
                self.line("optim", "adamw_torch");
                self.note(&format!("optim = {shown} exists only in temper: {}", key.doc));
            }
            ("train_sampling_strategy", _) if online => {
                self.line("shuffle_dataset", if word == "random" { "true" } else { "false" });
            }
            ("eval_strategy", _) if !self.evaluates() => self.line("eval_strategy", "\"no\""),
            ("eval_steps", _) if !self.evaluates() => {}
            ("eval_rows" | "data", _) => {} // written in the head
            ("peft_type", other) if other != "lora" && self.is("use_peft", "true") => {
                return unlike("TRL's commands make LoRA adapters only");
            }
            ("loss_type", "bco") if self.command == "kto" => {
                return unlike("TRL 1.16.0's kto command has no such loss");
            }
            ("reward_model", _) if !is_none(key) => {
                self.line("reward_model_name_or_path", &yaml(key));
                if !self
                    .value("reward_funcs")
                    .is_some_and(|v| v.as_array().is_none_or(Vec::is_empty))
                {
                    self.note(
                        "reward_weights: TRL puts the reward model's weight first, temper last",
                    );
                }
            }
            ("reward_funcs", _) => self.rewards(&key.value),
            ("chat_template_kwargs", "{}") => {}
            (name, _) if has_trl_key(self.command, name) => {
                let value = yaml(key);
                self.line(name, &value);
            }
            ("compat", _) => {}
            _ if !is_default => {
                let doc = key.doc.trim_start_matches("Ours. ");
                self.note(&format!("{} = {shown} exists only in temper: {doc}", key.name));
            }
            _ => {}
        }
        Ok(())
    }

    /// Writes the rewards that TRL has under TRL's names, and the others as comments.
    fn rewards(&mut self, specs: &Toml) {
        let specs = specs.as_array().cloned().unwrap_or_default();
        let mut named = Vec::new();
        for spec in &specs {
            let text = spec.as_str().unwrap_or_default();
            let python = text.strip_prefix("python:").and_then(|rest| rest.rsplit_once(':'));
            let module = python.and_then(|(file, function)| {
                let module = file.strip_suffix(".py")?;
                (!module.contains(['/', '.'])).then(|| format!("{module}.{function}"))
            });
            match (text, module) {
                ("think_format", _) => named.push("think_format_reward".to_string()),
                (_, Some(function)) => named.push(function),
                _ => self.note(&format!(
                    "reward {spec}: TRL has no reward of this name; write it in Python and add MODULE.FUNCTION to reward_funcs"
                )),
            }
        }
        if !named.is_empty() {
            let list: Vec<String> = named.iter().map(|name| quoted(name)).collect();
            self.line("reward_funcs", &format!("[{}]", list.join(", ")));
        }
    }
}

fn is_none(key: &Key) -> bool {
    key.value.as_str() == Some("none") && key.kind.ends_with("or none")
}

fn yaml(key: &Key) -> String {
    let json = key.kind.starts_with("JSON");
    match &key.value {
        _ if is_none(key) => "null".into(),
        Toml::String(text) if json => text.clone(), // JSON is YAML
        value => scalar(value),
    }
}

fn scalar(value: &Toml) -> String {
    match value {
        Toml::String(text) => quoted(text),
        Toml::Array(list) => {
            format!("[{}]", list.iter().map(scalar).collect::<Vec<_>>().join(", "))
        }
        // Without an exponent, which YAML 1.1 reads as text; some of TRL's numbers are integers.
        Toml::Float(number) => number.to_string(),
        other => other.to_string(),
    }
}

/// In quotes, so that no word is read as a number, a boolean or a date.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The builder of `datasets` for files like the first.
fn builder(files: &[PathBuf]) -> &'static str {
    let name = files.first().map(|file| file.display().to_string()).unwrap_or_default();
    let has = |ends: &[&str]| ends.iter().any(|end| name.contains(end));
    if has(&[".parquet"]) {
        "parquet"
    } else if has(&[".csv", ".tsv"]) {
        "csv"
    } else if has(&[".arrow", ".feather"]) {
        "arrow"
    } else {
        "json"
    }
}
