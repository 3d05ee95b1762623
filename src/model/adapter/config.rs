//! Adapter configs: reads and writes PEFT's and adapter-hub's `adapter_config.json`. Layer 5.
//!
//! Invariant: [`AdapterConfig::to_json`] returns the fields as read, except for those that are set
//! on saving.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::bottleneck::BottleneckConfig;
use super::pissa::rounds;
use crate::config::{LoraBias, PeftConfig, PeftType};
use crate::error::{Error, Result};
use crate::fsio;
use crate::model::layout::{ModelConfig, Task};
use crate::model::specs::Proj;

/// The modules that an adapter is applied to.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// Module names or their suffixes.
    Names(Vec<String>),
    /// A regular expression that matches whole module names.
    Pattern(String),
    /// Every projection of the blocks.
    AllLinear,
}

#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    pub r: usize,
    pub alpha: f64,
    pub dropout: f32,
    pub targets: Targets,
    /// (pattern, rank) and (pattern, alpha): the first pattern that matches the end of the module's
    /// name applies.
    pub rank_pattern: Vec<(String, f64)>,
    pub alpha_pattern: Vec<(String, f64)>,
    pub use_rslora: bool,
    pub use_dora: bool,
    pub bias: LoraBias,
    pub layers: Option<Vec<usize>>,
    /// PEFT's `init_lora_weights`: true, false, gaussian, pissa, pissa_niter_N.
    pub init: String,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Ia3Config {
    pub targets: Targets,
    pub feedforward: Vec<String>,
}

impl Targets {
    /// Reads the value of `lora_target_modules`.
    pub fn of(list: &[String]) -> Targets {
        match list {
            [one] if one == "all-linear" => Targets::AllLinear,
            [one] if one.contains(['^', '$', '*', '+', '?', '(', '[', '|', '\\']) => {
                Targets::Pattern(one.clone())
            }
            names => Targets::Names(names.to_vec()),
        }
    }
}

impl LoraConfig {
    /// Returns PiSSA's number of subspace iterations, Some(None) for an exact decomposition. None:
    /// another initialisation.
    pub fn pissa(&self) -> Option<Option<usize>> {
        rounds(&self.init)
    }

    /// Returns the config that a PiSSA adapter is saved with: plain LoRA of twice the rank with the
    /// same scale (PEFT's conversion).
    fn saved(&self) -> LoraConfig {
        if self.pissa().is_none() {
            return self.clone();
        }
        let twice =
            |p: &[(String, f64)], by: f64| p.iter().map(|(k, v)| (k.clone(), v * by)).collect();
        let by = if self.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
        LoraConfig {
            r: 2 * self.r,
            alpha: by * self.alpha,
            rank_pattern: twice(&self.rank_pattern, 2.0),
            alpha_pattern: twice(&self.alpha_pattern, by),
            init: "true".into(),
            ..self.clone()
        }
    }
}

/// Prompt tuning: trained rows before the embeddings of every sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptConfig {
    pub tokens: usize,
    /// token_dim, num_attention_heads, num_layers, which PEFT stores.
    pub model: [usize; 3],
    pub init_text: Option<String>,
    /// Tokens of the initial text, whose embeddings initialise a new prompt, repeated or truncated.
    /// Empty: normal(0, 1).
    pub init_ids: Vec<u32>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum AdapterKind {
    Lora(LoraConfig),
    Ia3(Ia3Config),
    Prompt(PromptConfig),
    Bottleneck(BottleneckConfig),
}

#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    pub kind: AdapterKind,
    pub modules_to_save: Vec<String>,
    /// `ensure_weight_tying`: a tied head stays tied to an embedding that is fully trained.
    pub tied: bool,
    /// `base_model_name_or_path`
    pub base: String,
    /// PEFT's task_type: CAUSAL_LM, SEQ_CLS, TOKEN_CLS.
    pub task: String,
    /// As read; empty for a new adapter.
    pub raw: Map<String, Value>,
}

impl AdapterConfig {
    /// Configures a new adapter by the options.
    pub fn from_keys(keys: &PeftConfig, model: &ModelConfig, base: &str) -> Result<AdapterConfig> {
        let targets = |default: &[&str]| match &keys.lora_target_modules {
            None => Targets::Names(default.iter().map(|s| s.to_string()).collect()),
            Some(list) => Targets::of(list),
        };
        let down = model.short_module(Proj::Down);
        let kind = match keys.peft_type {
            PeftType::Lora => AdapterKind::Lora(checked(LoraConfig {
                r: keys.lora_r,
                alpha: keys.lora_alpha,
                dropout: keys.lora_dropout as f32,
                targets: targets(match model.family.fused_projections {
                    true => &["qkv_proj"],
                    false => &["q_proj", "v_proj"],
                }),
                rank_pattern: pairs("rank_pattern", &keys.rank_pattern)?,
                alpha_pattern: pairs("alpha_pattern", &keys.alpha_pattern)?,
                use_rslora: keys.use_rslora,
                use_dora: keys.use_dora,
                bias: keys.bias,
                layers: keys.layers_to_transform.clone(),
                init: keys.init_lora_weights.clone(),
            })?),
            PeftType::Ia3 => {
                let feedforward =
                    keys.feedforward_modules.clone().unwrap_or_else(|| vec![down.into()]);
                AdapterKind::Ia3(Ia3Config {
                    targets: match model.family.fused_projections {
                        // PEFT's defaults for families with fused projections, such as GPT-2.
                        true => targets(&["qkv_proj", down]),
                        false => targets(&[model.family.ia3_attention, "v_proj", down]),
                    },
                    feedforward,
                })
            }
            PeftType::PromptTuning if model.task != Task::CausalLm => {
                return Err(Error::Config(
                    "peft_type = prompt_tuning: works only with language models; use lora".into(),
                ));
            }
            PeftType::PromptTuning => {
                if keys.num_virtual_tokens == 0 {
                    return Err(Error::Config(
                        "num_virtual_tokens = 0: an empty prompt learns nothing; give at least 1"
                            .into(),
                    ));
                }
                AdapterKind::Prompt(PromptConfig {
                    tokens: keys.num_virtual_tokens,
                    model: [model.hidden_size, model.num_heads, model.num_layers],
                    init_text: keys.prompt_tuning_init_text.clone(),
                    init_ids: Vec::new(),
                })
            }
            PeftType::SeqBn | PeftType::DoubleSeqBn | PeftType::ParBn => {
                AdapterKind::Bottleneck(BottleneckConfig::from_keys(keys, model)?)
            }
        };
        let mut modules_to_save = keys.lora_modules_to_save.clone().unwrap_or_default();
        // A classifier's score is new, so train it in full, as PEFT does for these tasks.
        if model.task != Task::CausalLm && !modules_to_save.iter().any(|m| m == "score") {
            modules_to_save.push("score".into());
        }
        Ok(AdapterConfig {
            kind,
            modules_to_save,
            tied: keys.ensure_weight_tying,
            base: base.into(),
            task: model.task.peft_name().into(),
            raw: Map::new(),
        })
    }

    /// Reads `dir/adapter_config.json`.
    pub fn load(dir: &Path) -> Result<AdapterConfig> {
        let path = dir.join("adapter_config.json");
        if !path.exists() {
            return Err(Error::model(
                dir,
                "has no adapter_config.json: give the folder of an adapter (PEFT's or adapter-hub's)",
            ));
        }
        let raw: Map<String, Value> = serde_json::from_slice(&fsio::read(&path)?)
            .map_err(|e| Error::model(&path, format!("is not a JSON object: {e}")))?;
        Self::from_json(&path, raw)
    }

    pub fn from_json(path: &Path, raw: Map<String, Value>) -> Result<AdapterConfig> {
        let wrong = |message: String| Error::model(path, message);
        if !raw.contains_key("peft_type") {
            let config = BottleneckConfig::from_json(path, &raw)?;
            let base = raw.get("model_name").and_then(Value::as_str).unwrap_or_default().into();
            let task = Task::CausalLm.peft_name().into();
            return Ok(AdapterConfig {
                kind: AdapterKind::Bottleneck(config),
                modules_to_save: Vec::new(),
                tied: false,
                base,
                task,
                raw,
            });
        }
        let text = |key: &str| raw.get(key).and_then(Value::as_str).unwrap_or_default().to_string();
        let on = |key: &str| raw.get(key).and_then(Value::as_bool).unwrap_or(false);
        let list = |key: &str| -> Result<Vec<String>> {
            match raw.get(key) {
                None | Some(Value::Null) => Ok(Vec::new()),
                Some(Value::String(one)) => Ok(vec![one.clone()]),
                Some(Value::Array(items)) if items.iter().all(Value::is_string) => {
                    Ok(items.iter().filter_map(Value::as_str).map(String::from).collect())
                }
                Some(other) => Err(wrong(format!("{key} must be a list of names, not {other}"))),
            }
        };
        let targets = match raw.get("target_modules") {
            Some(Value::String(s)) if s == "all-linear" => Targets::AllLinear,
            Some(Value::String(s)) => Targets::Pattern(s.clone()),
            _ => Targets::Names(list("target_modules")?),
        };
        let patterns = |key: &str| -> Result<Vec<(String, f64)>> {
            let Some(map) = raw.get(key).and_then(Value::as_object) else { return Ok(Vec::new()) };
            let pair = |(k, v): (&String, &Value)| v.as_f64().map(|v| (k.clone(), v));
            map.iter()
                .map(|p| pair(p).ok_or_else(|| wrong(format!("{key}: {} is not a number", p.1))))
                .collect()
        };
        let peft = text("peft_type");
        let refused = |keys: &[&str]| match keys.iter().find(|key| on(key)) {
            Some(key) => Err(wrong(format!("{key} = true is not supported here"))),
            None => Ok(()),
        };
        let kind = match peft.as_str() {
            "LORA" => {
                refused(&["fan_in_fan_out", "use_qalora", "lora_bias"])?;
                for key in [
                    "layer_replication",
                    "trainable_token_indices",
                    "target_parameters",
                    "use_bdlora",
                    "alora_invocation_tokens",
                    "arrow_config",
                    "kasa_config",
                    "monteclora_config",
                    "velora_config",
                ] {
                    if raw
                        .get(key)
                        .is_some_and(|v| !v.is_null() && *v != json!([]) && *v != json!(false))
                    {
                        return Err(wrong(format!("{key} is set; it is not supported here")));
                    }
                }
                let r = size(&raw, "r").map_err(wrong)?.unwrap_or(8);
                let layer = |v: &Value| {
                    whole(v)
                        .ok_or_else(|| wrong(format!("layers_to_transform: {v} is not a layer")))
                };
                let layers = match raw.get("layers_to_transform") {
                    Some(Value::Array(items)) => {
                        Some(items.iter().map(layer).collect::<Result<Vec<usize>>>()?)
                    }
                    Some(one @ Value::Number(_)) => Some(vec![layer(one)?]),
                    _ => None,
                };
                // PEFT counts the layers of the list with this name; models here have one list.
                let pattern = raw.get("layers_pattern").filter(|_| layers.is_some());
                let counted =
                    [json!(null), json!(""), json!([]), json!("layers"), json!(["layers"])];
                if let Some(other) = pattern.filter(|p| !counted.contains(p)) {
                    return Err(wrong(format!(
                        "layers_pattern is {other}, but layers_to_transform counts \"layers\""
                    )));
                }
                let decimal = |key: &str, absent: f64| match raw.get(key) {
                    None | Some(Value::Null) => Ok(absent),
                    Some(v) => {
                        v.as_f64().ok_or_else(|| wrong(format!("{key} = {v}: not a number")))
                    }
                };
                let init = match raw.get("init_lora_weights") {
                    Some(Value::Bool(b)) => b.to_string(),
                    Some(Value::String(s)) => s.clone(),
                    _ => "true".into(),
                };
                let config = LoraConfig {
                    r,
                    alpha: decimal("lora_alpha", 8.0)?,
                    dropout: decimal("lora_dropout", 0.0)? as f32,
                    targets,
                    rank_pattern: patterns("rank_pattern")?,
                    alpha_pattern: patterns("alpha_pattern")?,
                    use_rslora: on("use_rslora"),
                    use_dora: on("use_dora"),
                    bias: match text("bias").as_str() {
                        "" | "none" => LoraBias::None,
                        "all" => LoraBias::All,
                        "lora_only" => LoraBias::LoraOnly,
                        other => {
                            return Err(wrong(format!(
                                "bias = \"{other}\": must be none, all or lora_only"
                            )));
                        }
                    },
                    layers,
                    init,
                };
                if config.pissa().is_some_and(|rounds| rounds.is_some()) {
                    return Err(wrong(format!(
                        "init_lora_weights = {}: its values belong to a residual that was drawn at random; have peft save \
                         it with path_initial_model_for_weight_conversion",
                        config.init
                    )));
                }
                AdapterKind::Lora(checked(config).map_err(|e| wrong(e.to_string()))?)
            }
            "IA3" => {
                refused(&["fan_in_fan_out"])?;
                AdapterKind::Ia3(Ia3Config { targets, feedforward: list("feedforward_modules")? })
            }
            "PROMPT_TUNING" => {
                let number = |key: &str| -> Result<usize> {
                    Ok(size(&raw, key).map_err(wrong)?.unwrap_or(0))
                };
                let tokens = number("num_virtual_tokens")?;
                if tokens == 0 {
                    return Err(wrong("num_virtual_tokens is missing".into()));
                }
                let init_text =
                    raw.get("prompt_tuning_init_text").and_then(Value::as_str).map(String::from);
                let model =
                    [number("token_dim")?, number("num_attention_heads")?, number("num_layers")?];
                AdapterKind::Prompt(PromptConfig { tokens, model, init_text, init_ids: Vec::new() })
            }
            other => {
                return Err(wrong(format!(
                    "peft_type \"{other}\" is not supported here; supported: LORA, IA3, \
                     PROMPT_TUNING"
                )));
            }
        };
        let task = match text("task_type") {
            t if t.is_empty() => "CAUSAL_LM".into(),
            t => t,
        };
        Ok(AdapterConfig {
            kind,
            modules_to_save: list("modules_to_save")?,
            tied: on("ensure_weight_tying"),
            base: text("base_model_name_or_path"),
            task,
            raw,
        })
    }

    /// Reads `exclude_modules`: names or their suffixes, or a pattern for whole names. None:
    /// nothing is excluded.
    pub fn excluded(&self) -> Result<Option<Targets>> {
        match self.raw.get("exclude_modules") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(pattern)) if pattern.is_empty() => Ok(None),
            Some(Value::String(pattern)) => Ok(Some(Targets::Pattern(pattern.clone()))),
            Some(Value::Array(items)) if items.iter().all(Value::is_string) => {
                let names = items.iter().filter_map(Value::as_str).map(String::from).collect();
                Ok(Some(Targets::Names(names)))
            }
            Some(other) => Err(Error::Config(format!(
                "exclude_modules must be a list of names or a pattern, not {other}"
            ))),
        }
    }

    /// Returns adapter_config.json as PEFT 0.19 writes and reads it.
    pub fn to_json(&self) -> Map<String, Value> {
        if let AdapterKind::Bottleneck(c) = &self.kind {
            return c.to_json(&self.raw, &self.base);
        }
        let mut out = self.raw.clone();
        let mut set = |key: &str, value: Value| drop(out.insert(key.into(), value));
        let targets = |t: &Targets| match t {
            Targets::Names(names) => json!(names),
            Targets::Pattern(p) => json!(p),
            Targets::AllLinear => json!("all-linear"),
        };
        set("base_model_name_or_path", json!(self.base));
        set("inference_mode", json!(true));
        set("task_type", json!(self.task));
        set("peft_version", json!("0.19.1"));
        let save =
            if self.modules_to_save.is_empty() { Value::Null } else { json!(self.modules_to_save) };
        set("modules_to_save", save);
        if self.tied {
            set("ensure_weight_tying", json!(true));
        }
        match &self.kind {
            AdapterKind::Lora(c) => {
                let c = c.saved();
                let map = |p: &[(String, f64)]| {
                    Value::Object(
                        p.iter().map(|(k, v)| (k.clone(), number(*v))).collect::<Map<_, _>>(),
                    )
                };
                set("peft_type", json!("LORA"));
                set("r", json!(c.r));
                set("lora_alpha", number(c.alpha));
                // The shortest decimal, as users write it (0.05), not the f32 widened to f64.
                let dropout: f64 = c.dropout.to_string().parse().unwrap_or(f64::from(c.dropout));
                set("lora_dropout", json!(dropout));
                set("target_modules", targets(&c.targets));
                set("rank_pattern", map(&c.rank_pattern));
                set("alpha_pattern", map(&c.alpha_pattern));
                set("use_rslora", json!(c.use_rslora));
                set("use_dora", json!(c.use_dora));
                set("layers_to_transform", json!(c.layers));
                set("fan_in_fan_out", json!(false));
                let bias = match c.bias {
                    LoraBias::None => "none",
                    LoraBias::All => "all",
                    LoraBias::LoraOnly => "lora_only",
                };
                set("bias", json!(bias));
                set(
                    "init_lora_weights",
                    c.init.parse::<bool>().map_or_else(|_| json!(c.init), |b| json!(b)),
                );
            }
            AdapterKind::Ia3(c) => {
                set("peft_type", json!("IA3"));
                set("target_modules", targets(&c.targets));
                set("feedforward_modules", json!(c.feedforward));
                set("fan_in_fan_out", json!(false));
                set("init_ia3_weights", json!(true));
            }
            AdapterKind::Prompt(c) => {
                set("peft_type", json!("PROMPT_TUNING"));
                set("num_virtual_tokens", json!(c.tokens));
                let init = if c.init_text.is_some() { "TEXT" } else { "RANDOM" };
                set("prompt_tuning_init", json!(init));
                set("prompt_tuning_init_text", json!(c.init_text));
                set(
                    "tokenizer_name_or_path",
                    c.init_text.as_ref().map_or(Value::Null, |_| json!(self.base)),
                );
                set("num_transformer_submodules", json!(1));
                for (key, value) in
                    ["token_dim", "num_attention_heads", "num_layers"].iter().zip(c.model)
                {
                    set(key, json!(value));
                }
            }
            AdapterKind::Bottleneck(_) => {}
        }
        out
    }
}

const MAX_RANK: f64 = 32768.0;

/// Upper bound on the numbers of tokens and layers in a file. No model has more, and products of
/// larger numbers would overflow.
const MOST: u64 = 1 << 20;

fn whole(value: &Value) -> Option<usize> {
    value.as_u64().filter(|n| *n <= MOST).map(|n| n as usize)
}

/// Reads the size `key`, if present.
fn size(raw: &Map<String, Value>, key: &str) -> std::result::Result<Option<usize>, String> {
    match raw.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(v) => whole(v)
            .filter(|n| *n > 0)
            .map(Some)
            .ok_or_else(|| format!("{key} = {v}: must be a whole number from 1 to {MOST}")),
    }
}

/// Rejects numbers out of range, unknown initialisations, and options that PiSSA does not support.
fn checked(config: LoraConfig) -> Result<LoraConfig> {
    let rank = |rank: f64| rank.fract() == 0.0 && (1.0..=MAX_RANK).contains(&rank);
    let alpha = |alpha: f64| alpha > 0.0 && alpha <= 1e9;
    let wrong = |what: String| Err(Error::Config(what));
    let ranks = config.rank_pattern.iter().map(|(pattern, r)| (pattern.as_str(), *r));
    if let Some((name, r)) = ranks.chain([("r", config.r as f64)]).find(|(_, r)| !rank(*r)) {
        return wrong(format!("{name} = {r}: a rank must be a whole number from 1 to {MAX_RANK}"));
    }
    let alphas = config.alpha_pattern.iter().map(|(pattern, a)| (pattern.as_str(), *a));
    let alphas = alphas.chain([("lora_alpha", config.alpha)]);
    if let Some((name, a)) = { alphas }.find(|(_, a)| !alpha(*a)) {
        return wrong(format!("{name} = {a}: an alpha must be above 0 and at most 1e9"));
    }
    if !(0.0..1.0).contains(&config.dropout) {
        return wrong(format!("lora_dropout = {}: must be at least 0 and below 1", config.dropout));
    }
    let init = &config.init;
    if config.pissa().is_none() && !["true", "false", "gaussian"].contains(&init.as_str()) {
        let message = format!(
            "init_lora_weights = {init}: must be true, false, gaussian, pissa or pissa_niter_N"
        );
        return Err(Error::Config(message));
    }
    if config.pissa().is_some() && (config.dropout > 0.0 || config.use_dora) {
        let message = "init_lora_weights = pissa needs lora_dropout=0 and use_dora=false: the \
                       part that is taken out of the weight must get the same input as the weight";
        return Err(Error::Config(message.into()));
    }
    Ok(config)
}

/// Writes a whole number as a JSON integer: PEFT's `r` and alphas are ints.
fn number(v: f64) -> Value {
    if v.fract() == 0.0 && v.abs() < 9e15 { json!(v as i64) } else { json!(v) }
}

/// Parses `pattern=value` items.
pub fn pairs(key: &str, items: &Option<Vec<String>>) -> Result<Vec<(String, f64)>> {
    let parse = |item: &String| {
        let (pattern, value) = item.rsplit_once('=')?;
        value.trim().parse::<f64>().ok().map(|v| (pattern.trim().to_string(), v))
    };
    let items = items.iter().flatten();
    items
        .map(|i| {
            parse(i).ok_or_else(|| {
                Error::Config(format!("{key}: \"{i}\" is not of the form pattern=number"))
            })
        })
        .collect()
}
