//! Reads config.json in its v4 and v5 forms, checks it as a whole, and writes it with only the
//! necessary changes. Layer 5.
//!
//! Invariant: a `ModelConfig` equals what transformers 5.17 reads from the same file, or reading is
//! an error that lists every problem of the file.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::families;
use super::fields::Fields;
use super::layout::{
    ActRule, AttentionScaleRule, BiasRule, EmbeddingRule, EmbeddingScale, Family, HiddenAct, Mixer,
    MixerRule, MlpWidthRule, ModelConfig, NormPlace, SoftcapRule, Task, WindowRule,
};
use super::rope::{RopeConfig, inv_freq};
use super::rope_config::{RopeFacts, both_forms, layer_ropes};
use crate::error::{Error, Result};
use crate::fsio;
use crate::ops::logit_map::LogitMap;
use crate::ops::rmsnorm::NormWeight;
use crate::tensor::safetensors::HostDtype;

const MAX_SIZE: usize = 1 << 28; // of a dimension; products of two cannot overflow
const MAX_LAYERS: usize = 10_000;
const MAX_TAPS: usize = 64; // of a convolution
const MAX_PARAMETERS: u128 = 1 << 44;

impl ModelConfig {
    /// Reads `dir/config.json`.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let path = dir.as_ref().join("config.json");
        if !path.exists() {
            let message = match dir.as_ref().join("adapter_config.json").exists() {
                true => {
                    "is an adapter, not a model: give its base as --model, and this folder as --adapter"
                }
                false => "has no config.json: give a Hugging Face model folder",
            };
            return Err(Error::model(dir, message));
        }
        let raw: Map<String, Value> = serde_json::from_slice(&fsio::read(&path)?)
            .map_err(|e| Error::model(&path, format!("is not a JSON object: {e}")))?;
        Self::from_json(&path, raw)
    }

    /// Reads and checks the map of a config.json; `path` is for messages. The error lists all
    /// problems.
    pub fn from_json(path: impl AsRef<Path>, raw: Map<String, Value>) -> Result<Self> {
        let mut f = Fields::new(&raw, "");
        let Some((family, task)) = family(&mut f) else {
            return Err(Error::model(path, f.problems.join("; ")));
        };
        let hidden_size = f.required_size("hidden_size", MAX_SIZE);
        let num_layers = f.required_size("num_hidden_layers", MAX_LAYERS);
        let num_heads = f.required_size("num_attention_heads", MAX_SIZE);
        let num_kv_heads = match family.default_kv_heads {
            Some(n) if !f.is_null("num_key_value_heads") => {
                f.size("num_key_value_heads", MAX_SIZE).unwrap_or(n)
            }
            _ => f.size("num_key_value_heads", MAX_SIZE).unwrap_or(num_heads),
        };
        let head_dim = f
            .size("head_dim", 1 << 16)
            .or(family.default_head_dim)
            .unwrap_or(hidden_size / num_heads);
        let max_position_embeddings =
            f.size("max_position_embeddings", 1 << 40).unwrap_or(family.default_max_positions);
        let intermediate_size = mlp_width(&mut f, family);
        let tied = family.old_key("tie_word_embeddings").and_then(|key| f.boolean(key));
        let mut config = ModelConfig {
            family,
            task,
            vocab_size: f.required_size("vocab_size", MAX_SIZE),
            hidden_size,
            intermediate_size,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            max_position_embeddings,
            rms_norm_eps: f
                .number(family.eps_key, "a number of at least 0", |x| x >= 0.0)
                .unwrap_or(family.default_eps) as f32,
            hidden_act: hidden_act(&mut f, family.hidden_act),
            tie_word_embeddings: tied
                .or_else(|| f.boolean("tie_word_embeddings"))
                .unwrap_or(family.default_tie),
            qkv_bias: switch(&mut f, family.qkv_bias),
            o_bias: switch(&mut f, family.o_bias),
            mlp_bias: switch(&mut f, family.mlp_bias),
            norm_weight: family.norm_weight,
            norm_place: family.norm_place,
            qk_norm: family.qk_norm,
            embedding_scale: embedding_scale(&mut f, family.embedding_scale, hidden_size),
            attention_scale: attention_scale(&mut f, family.attention_scale, head_dim),
            attention_softcap: softcap(&mut f, family.attention_softcap),
            residual_scale: family.residual_scale.map_or(1.0, |key| multiplier(&mut f, key)),
            logits: LogitMap {
                divisor: family.logits_divisor.map_or(1.0, |key| multiplier(&mut f, key)),
                softcap: softcap(&mut f, family.logits_softcap),
            },
            mixers: Vec::new(),
            sliding_window: Vec::new(),
            ropes: Vec::new(),
            layer_rope: Vec::new(),
            attention_dropout: f
                .number("attention_dropout", "from 0 to 1", |x| (0.0..1.0).contains(&x))
                .unwrap_or(0.0) as f32,
            initializer_range: f
                .number("initializer_range", "from 0 to 1", |x| (0.0..=1.0).contains(&x))
                .unwrap_or(0.02) as f32,
            bos: one_id(&mut f, "bos_token_id", family.default_bos),
            eos: eos_ids(&mut f, family.default_eos),
            pad: one_id(&mut f, "pad_token_id", family.default_pad),
            dtype: dtype(&mut f),
            raw: Map::new(),
        };
        if let Some(key) = family.refused
            && f.boolean(key).unwrap_or(false)
        {
            f.problem(format!("{key} is true; it is not supported"));
        }
        if f.value("quantization_config").is_some() {
            f.problem(
                "quantization_config: quantised weights are not supported; use the folder that \
                 they were made from",
            );
        }
        let layers = num_layers.min(MAX_LAYERS);
        config.mixers = mixers(&mut f, family.mixers, layers);
        let mut windows = sliding_window(&mut f, family.window, layers);
        let mut problems = f.problems;
        let facts = RopeFacts {
            head_dim,
            max_positions: max_position_embeddings,
            default_theta: family.default_theta,
            default_original_positions: family.default_original_positions,
            query_scale: family.query_scale,
        };
        let sliding: Vec<bool> = windows.iter().map(Option::is_some).collect();
        (config.ropes, config.layer_rope) =
            layer_ropes(&raw, family.rope, &facts, &sliding, &mut problems);
        for (rope, mixer) in config.layer_rope.iter_mut().zip(&config.mixers) {
            *rope = rope.filter(|_| *mixer == Mixer::Attention);
        }
        if matches!(family.window, WindowRule::WithoutRope) && !raw.contains_key("layer_types") {
            // Of the layers that may have a window, only those without rope have one.
            for (window, rope) in windows.iter_mut().zip(&config.layer_rope) {
                *window = window.filter(|_| rope.is_none());
            }
        }
        config.sliding_window = windows;
        problems.dedup();
        if problems.is_empty() {
            config.contradictions(&raw, &mut problems);
        }
        if !problems.is_empty() {
            let lines = problems.join("\n  ");
            return Err(Error::model(
                path,
                if problems.len() == 1 { lines } else { format!("\n  {lines}") },
            ));
        }
        config.raw = raw;
        Ok(config)
    }

    /// Makes a new Llama config with the usual settings (rope theta 10000, eps 1e-5, silu, no
    /// biases), whose [`raw`](Self::raw) form transformers can load. The caller ensures that heads
    /// divides hidden and kv_heads divides heads.
    #[allow(clippy::too_many_arguments)]
    pub fn llama(
        vocab: usize,
        hidden: usize,
        intermediate: usize,
        layers: usize,
        heads: usize,
        kv_heads: usize,
        max_positions: usize,
        tie: bool,
    ) -> Self {
        let family = families::find("llama").unwrap_or(families::FAMILIES[0]);
        let head_dim = hidden / heads.max(1);
        let raw = json!({
            "architectures": [family.architecture], "attention_bias": false, "attention_dropout": 0.0,
            "bos_token_id": 1, "dtype": "float32", "eos_token_id": 2, "head_dim": head_dim, "hidden_act": "silu",
            "hidden_size": hidden, "initializer_range": 0.02, "intermediate_size": intermediate,
            "max_position_embeddings": max_positions, "mlp_bias": false, "model_type": family.model_type,
            "num_attention_heads": heads, "num_hidden_layers": layers, "num_key_value_heads": kv_heads,
            "pad_token_id": null, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
            "rope_parameters": { "rope_theta": 10000.0, "rope_type": "default" }, "rope_scaling": null,
            "rope_theta": 10000.0, "tie_word_embeddings": tie, "torch_dtype": "float32", "use_cache": true,
            "vocab_size": vocab
        });
        ModelConfig {
            family,
            task: Task::CausalLm,
            vocab_size: vocab,
            hidden_size: hidden,
            intermediate_size: intermediate,
            num_layers: layers,
            num_heads: heads,
            num_kv_heads: kv_heads,
            head_dim,
            max_position_embeddings: max_positions,
            rms_norm_eps: 1e-5,
            hidden_act: HiddenAct::Silu,
            tie_word_embeddings: tie,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            norm_weight: NormWeight::Rounded,
            norm_place: NormPlace::Before,
            qk_norm: None,
            embedding_scale: None,
            attention_scale: (head_dim as f32).powf(-0.5),
            attention_softcap: None,
            residual_scale: 1.0,
            logits: LogitMap::PLAIN,
            mixers: vec![Mixer::Attention; layers],
            sliding_window: vec![None; layers],
            ropes: vec![RopeConfig::plain(1e4)],
            layer_rope: vec![Some(0); layers],
            attention_dropout: 0.0,
            initializer_range: 0.02,
            bos: Some(1),
            eos: vec![2],
            pad: None,
            dtype: Some(HostDtype::F32),
            raw: raw.as_object().cloned().unwrap_or_default(),
        }
    }

    /// Returns the config.json to save: [`raw`](Self::raw) updated with changed fields (vocab_size,
    /// tying, bos, eos, pad), with `dtype`, and with rope and dtype under both their v4 and v5
    /// names, so that both versions of transformers can load it. Other fields stay unchanged.
    pub fn to_json(&self, dtype: HostDtype) -> Map<String, Value> {
        let mut out = self.raw.clone();
        let before = Self::from_json("config.json", self.raw.clone()).ok();
        let changed =
            |same: fn(&Self, &Self) -> bool| before.as_ref().is_none_or(|b| !same(b, self));
        let mut set = |key: &str, value: Value| drop(out.insert(key.into(), value));
        if changed(|a, b| a.task == b.task) {
            set("architectures", json!([self.family.class(self.task)]));
            if let Some(n) = self.task.labels() {
                let names = (0..n).map(|i| (i.to_string(), json!(format!("LABEL_{i}"))));
                set("id2label", Value::Object(names.collect()));
                set(
                    "label2id",
                    Value::Object((0..n).map(|i| (format!("LABEL_{i}"), json!(i))).collect()),
                );
            }
        }
        if changed(|a, b| a.vocab_size == b.vocab_size) {
            set("vocab_size", json!(self.vocab_size));
        }
        if changed(|a, b| a.tie_word_embeddings == b.tie_word_embeddings) {
            let key = "tie_word_embeddings";
            set(key, json!(self.tie_word_embeddings));
            if let Some(old) = self.family.old_key(key).filter(|old| self.raw.contains_key(*old)) {
                set(old, json!(self.tie_word_embeddings));
            }
        }
        if changed(|a, b| a.bos == b.bos) {
            set("bos_token_id", json!(self.bos));
        }
        if changed(|a, b| a.pad == b.pad) {
            set("pad_token_id", json!(self.pad));
        }
        if changed(|a, b| a.eos == b.eos) {
            let eos = match self.eos.as_slice() {
                [] => Value::Null,
                [one] => json!(one),
                many => json!(many),
            };
            set("eos_token_id", eos);
        }
        if let Some(name) = dtype.torch_name() {
            set("dtype", json!(name));
            set("torch_dtype", json!(name));
        }
        both_forms(&mut out, self.family.rope, &self.ropes);
        out
    }

    fn contradictions(&self, raw: &Map<String, Value>, problems: &mut Vec<String>) {
        let (hidden, heads, kv) = (self.hidden_size, self.num_heads, self.num_kv_heads);
        let given = self.family.default_head_dim.is_some()
            || raw.get("head_dim").is_some_and(|v| !v.is_null());
        if !hidden.is_multiple_of(heads) && (self.family.heads_divide_hidden || !given) {
            problems.push(format!(
                "hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            ));
        }
        if !heads.is_multiple_of(kv) {
            problems.push(format!(
                "num_attention_heads {heads} is not a multiple of num_key_value_heads {kv}"
            ));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            problems.push(format!(
                "head_dim {} is not even, but rope rotates pairs of values",
                self.head_dim
            ));
        }
        // In u128, since a product of the largest sizes overflows usize.
        let [h, m, q] = [hidden, self.intermediate_size, heads].map(|n| n as u128);
        let width = self.head_dim as u128 * (2 * q + 2 * kv as u128);
        let taps = self.conv_taps().map(|taps| taps as u128);
        let mixer = width.max(taps.map_or(0, |taps| 4 * h + taps + 6));
        let parameters = 2 * self.vocab_size as u128 * h
            + self.num_layers as u128 * (h + 1) * (mixer + 3 * m + 4);
        if parameters > MAX_PARAMETERS || width > MAX_SIZE as u128 {
            problems.push(format!(
                "the sizes give {parameters} parameters; at most {MAX_PARAMETERS} are possible: \
                 check hidden_size, intermediate_size, vocab_size, num_hidden_layers, \
                 num_attention_heads and head_dim"
            ));
            return; // the checks below allocate these sizes
        }
        for rope in &self.ropes {
            let both = [false, true].map(|long| inv_freq(rope, self.head_dim, long));
            if both.iter().flatten().any(|f| !f.is_finite()) {
                problems
                    .push(format!("rope settings give frequencies that are not finite: {rope:?}"));
            }
        }
    }
}

fn family(f: &mut Fields) -> Option<(&'static Family, Task)> {
    let model_type = f.string("model_type");
    let architecture = f.array("architectures").and_then(|a| a.first()).and_then(Value::as_str);
    if !f.problems.is_empty() {
        return None;
    }
    let supported = families::supported();
    let Some(name) = model_type.or(architecture) else {
        f.problem(format!("has neither model_type nor architectures; supported: {supported}"));
        return None;
    };
    let Some(family) = families::find(name) else {
        // No hint at a similar name: qwen3_5 is another architecture, not a misspelt qwen3.
        f.problem(format!("model_type {name:?} is not supported; supported: {supported}"));
        return None;
    };
    let labels = labels(f);
    let tasks = [
        Task::CausalLm,
        Task::SequenceClassification { labels },
        Task::TokenClassification { labels },
    ];
    let Some(a) = architecture else { return Some((family, Task::CausalLm)) };
    match tasks.into_iter().find(|t| family.class(*t) == a) {
        Some(task) => Some((family, task)),
        None => {
            let names: Vec<String> = tasks.iter().map(|t| family.class(*t)).collect();
            f.problem(format!(
                "architecture {a:?} is not supported here; supported in this family: {}",
                names.join(", ")
            ));
            None
        }
    }
}

/// transformers' `num_labels`: the number of entries in `id2label`, else 2.
fn labels(f: &mut Fields) -> usize {
    match f.value("id2label").and_then(Value::as_object) {
        Some(names) => names.len().max(1),
        None => f.size("num_labels", 1 << 16).unwrap_or(2),
    }
}

fn switch(f: &mut Fields, switch: BiasRule) -> bool {
    match switch {
        BiasRule::Never => false,
        BiasRule::Always => true,
        BiasRule::Key(key) => f.boolean(key).unwrap_or(false),
    }
}

/// Returns the width of the MLP, computed by the family's rule.
fn mlp_width(f: &mut Fields, family: &Family) -> usize {
    let old = family.old_key("intermediate_size").and_then(|key| f.size(key, MAX_SIZE));
    let given = old.unwrap_or_else(|| f.required_size("intermediate_size", MAX_SIZE));
    let MlpWidthRule::TwoThirds { default_multiple } = family.mlp_width else { return given };
    if !f.boolean("block_auto_adjust_ff_dim").unwrap_or(true) {
        return given;
    }
    let two_thirds = 2 * given / 3;
    let key = "block_ffn_dim_multiplier";
    if f.is_null(key) {
        return two_thirds.max(1);
    }
    let factor = f.number(key, "a number above 0 and at most 1000", |x| x > 0.0 && x <= 1e3);
    let multiple = f.size("block_multiple_of", MAX_SIZE).unwrap_or(default_multiple);
    let width = (factor.unwrap_or(1.0) * two_thirds as f64) as usize;
    width.next_multiple_of(multiple).clamp(1, MAX_SIZE)
}

/// Returns the token mixer of each layer.
fn mixers(f: &mut Fields, rule: MixerRule, layers: usize) -> Vec<Mixer> {
    let MixerRule::AttentionOrConv { default_taps } = rule else {
        return vec![Mixer::Attention; layers];
    };
    let taps = f.size("conv_L_cache", MAX_TAPS).unwrap_or(default_taps);
    let conv = Mixer::ShortConv { taps, bias: f.boolean("conv_bias").unwrap_or(false) };
    let mixer = |attends: bool| if attends { Mixer::Attention } else { conv };
    if let Some(types) = f.array("layer_types") {
        if types.len() != layers {
            let n = types.len();
            f.problem(format!("layer_types has {n} entries, num_hidden_layers is {layers}"));
        }
        let unknown = |t: &&Value| **t != "full_attention" && **t != "conv";
        if let Some(other) = types.iter().find(unknown) {
            f.problem(format!("layer_types has {other}; supported: full_attention and conv"));
        }
        let kinds = types.iter().map(|t| t == "full_attention").chain(std::iter::repeat(true));
        return kinds.take(layers).map(mixer).collect();
    }
    let Some(full) = f.array("full_attn_idxs") else { return vec![Mixer::Attention; layers] };
    let is_layer = |v: &&Value| v.as_u64().is_some_and(|i| i < layers as u64);
    if let Some(other) = full.iter().find(|v| !is_layer(v)) {
        f.problem(format!("full_attn_idxs has {other}; it must be the number of a layer"));
    }
    (0..layers).map(|i| mixer(full.iter().any(|v| *v == i))).collect()
}

fn hidden_act(f: &mut Fields, rule: ActRule) -> HiddenAct {
    let key = rule.key;
    match f.string(key) {
        None => rule.default,
        Some("silu" | "swish") => HiddenAct::Silu,
        Some("gelu" | "gelu_python") => HiddenAct::Gelu,
        Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_python_tanh") => HiddenAct::GeluTanh,
        Some(other) => {
            f.problem(format!(
                "{key} is {other:?}; supported: silu, gelu, gelu_pytorch_tanh, gelu_new"
            ));
            HiddenAct::Silu
        }
    }
}

/// Reads a factor above 0; 1 if absent.
fn multiplier(f: &mut Fields, key: &str) -> f32 {
    f.number(key, "a number above 0", in_f32).unwrap_or(1.0) as f32
}

/// Whether a number is also normal and above 0 in f32.
fn in_f32(x: f64) -> bool {
    (x as f32).is_normal() && x > 0.0
}

fn softcap(f: &mut Fields, rule: SoftcapRule) -> Option<f32> {
    match rule {
        SoftcapRule::Never => None,
        SoftcapRule::Key { key, .. } if f.is_null(key) => None,
        SoftcapRule::Key { key, default } => {
            f.number(key, "a number above 0, or null", in_f32).map(|c| c as f32).or(default)
        }
    }
}

fn embedding_scale(
    f: &mut Fields,
    rule: EmbeddingRule,
    hidden_size: usize,
) -> Option<EmbeddingScale> {
    match rule {
        EmbeddingRule::None => None,
        EmbeddingRule::SqrtHidden => {
            let factor = (hidden_size as f64).sqrt() as f32;
            Some(EmbeddingScale::of_tokens(factor))
        }
        EmbeddingRule::Key(key) => {
            let factor = multiplier(f, key);
            (factor != 1.0).then_some(EmbeddingScale::of_inputs(factor))
        }
    }
}

fn attention_scale(f: &mut Fields, rule: AttentionScaleRule, head_dim: usize) -> f32 {
    match rule {
        AttentionScaleRule::HeadDim => (head_dim as f32).powf(-0.5),
        AttentionScaleRule::InverseSqrt { key, default } => {
            let number = f.number(key, "a number above 0", in_f32).unwrap_or(default);
            number.powf(-0.5) as f32
        }
        AttentionScaleRule::Key(key) => multiplier(f, key),
    }
}

fn sliding_window(f: &mut Fields, rule: WindowRule, layers: usize) -> Vec<Option<usize>> {
    let on = |f: &mut Fields| {
        f.boolean("use_sliding_window").unwrap_or(false) && !f.is_null("sliding_window")
    };
    let every = |f: &mut Fields, default: Option<usize>| {
        let window = default.filter(|_| !f.is_null("sliding_window"));
        f.size("sliding_window", usize::MAX).or(window)
    };
    match rule {
        WindowRule::Ignored => vec![None; layers],
        WindowRule::Every { default } => vec![every(f, default); layers],
        WindowRule::Typed { default } => {
            let window = every(f, Some(default));
            let types = layer_types(f, window, "sliding_window is null", layers);
            types.unwrap_or_else(|| vec![window; layers])
        }
        WindowRule::WithoutRope => {
            let given = f.size("sliding_window", usize::MAX);
            let window = given.filter(|_| on(f));
            let types = layer_types(f, window, WINDOW_OFF, layers);
            types.unwrap_or_else(|| vec![window; layers])
        }
        WindowRule::Listed { default, default_full_layers } => {
            let on = on(f);
            let window = f.size("sliding_window", usize::MAX).unwrap_or(default);
            let window = on.then_some(window);
            if let Some(types) = layer_types(f, window, WINDOW_OFF, layers) {
                return types;
            }
            let full = match f.value("max_window_layers").map(|v| (v, v.as_u64())) {
                None => default_full_layers,
                Some((_, Some(n))) => usize::try_from(n).unwrap_or(usize::MAX),
                Some((v, None)) => {
                    f.wrong("max_window_layers", v, "an integer of at least 0").unwrap_or(0)
                }
            };
            (0..layers).map(|i| window.filter(|_| i >= full)).collect()
        }
        WindowRule::Pattern { default, period, key } => {
            let window = every(f, Some(default));
            let off = "sliding_window is null";
            if let Some(types) = layer_types(f, window, off, layers) {
                return types;
            }
            let period = key.and_then(|key| f.size(key, usize::MAX)).unwrap_or(period);
            let slides = |i: usize| !(i + 1).is_multiple_of(period);
            if window.is_none() && (0..layers).any(slides) {
                f.problem(format!("there are layers of sliding attention, but {off}"));
            }
            (0..layers).map(|i| window.filter(|_| slides(i))).collect()
        }
    }
}

const WINDOW_OFF: &str = "use_sliding_window or sliding_window is off";

/// Returns the windows that `layer_types` gives, if present; `off` says why there is no window.
fn layer_types(
    f: &mut Fields,
    window: Option<usize>,
    off: &str,
    layers: usize,
) -> Option<Vec<Option<usize>>> {
    let types = f.array("layer_types")?;
    if types.len() != layers {
        f.problem(format!(
            "layer_types has {} entries, num_hidden_layers is {layers}",
            types.len()
        ));
    }
    let unknown = |t: &&Value| **t != "sliding_attention" && **t != "full_attention";
    if let Some(other) = types.iter().find(unknown) {
        f.problem(format!(
            "layer_types has {other}; supported: full_attention and sliding_attention"
        ));
    }
    let sliding: Vec<bool> = types.iter().map(|t| t == "sliding_attention").collect();
    if sliding.contains(&true) && window.is_none() {
        f.problem(format!("layer_types has sliding_attention, but {off}"));
    }
    Some(sliding.into_iter().map(|s| window.filter(|_| s)).collect())
}

/// Reads an id. Negative (an old way to write none) and null mean none; `default` applies only if
/// the key is absent.
fn one_id(f: &mut Fields, key: &str, default: Option<u32>) -> Option<u32> {
    match f.value(key) {
        None => default.filter(|_| !f.is_null(key)),
        Some(value) => id(f, key, value),
    }
}

fn eos_ids(f: &mut Fields, default: Option<u32>) -> Vec<u32> {
    match f.value("eos_token_id") {
        Some(Value::Array(ids)) => ids.iter().filter_map(|v| id(f, "eos_token_id", v)).collect(),
        _ => one_id(f, "eos_token_id", default).into_iter().collect(),
    }
}

fn id(f: &mut Fields, key: &str, value: &Value) -> Option<u32> {
    match value.as_i64() {
        Some(n) if n < 0 => None,
        n => n.and_then(|n| u32::try_from(n).ok()).or_else(|| f.wrong(key, value, "a token id")),
    }
}

fn dtype(f: &mut Fields) -> Option<HostDtype> {
    let key = if f.value("dtype").is_some() { "dtype" } else { "torch_dtype" };
    let name = f.string(key)?;
    let dtype = HostDtype::from_torch_name(name);
    if dtype.is_none() && name != "auto" {
        f.problem(format!("{key} is {name:?}; supported: float32, float16, bfloat16"));
    }
    dtype
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
