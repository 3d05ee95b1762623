//! Bottleneck adapters: two narrow layers after attention, after the MLP or beside it. Layer 5.
//!
//! out = stream + branch + s (act(z D^T + d) U^T + u), where `branch` is the output of attention or
//! the MLP, and z is (names of adapter-hub in brackets) the branch (`double_seq_bn`: Houlsby et
//! al., "Parameter-Efficient Transfer Learning for NLP", 2019), branch + stream (`seq_bn`: Pfeiffer
//! et al., "AdapterFusion", 2020: after the MLP only), or the stream (`par_bn`: He et al., "Towards
//! a Unified View of Parameter-Efficient Transfer Learning", 2021). These are the sums of the
//! `adapters` library, 1.3.0, on a pre-norm decoder, where it passes no norm to the adapter.
//!
//! Invariant: an `adapter_config.json` that asks for anything else is rejected; folders have
//! adapter-hub's layout, with `adapter.safetensors` (its `use_safetensors=True`).

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::autograd::Cx;
use crate::config::{PeftConfig, PeftType};
use crate::error::{Error, Result};
use crate::model::layout::{ModelConfig, NormPlace, Task};
use crate::model::params::ParamSet;
use crate::model::specs::{BottleneckPart, BottleneckSite, ParamSpec, Role};
use crate::ops::activation::{Act, activation};
use crate::ops::add::add;
use crate::ops::matmul::linear;
use crate::ops::scale::scale_columns;
use crate::tensor::Tensor;

/// File name of adapter-hub's weights.
pub const WEIGHTS: &str = "adapter.safetensors";

/// Input of a bottleneck adapter: the branch, the branch plus the stream, or the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BottleneckInput {
    Branch,
    Sum,
    Stream,
}

/// adapter-hub's defaults for one of its types.
struct Preset {
    name: &'static str,
    attention: bool,
    input: BottleneckInput,
    reduction_factor: f64,
    non_linearity: &'static str,
    scaling: f64,
    init: &'static str,
}

const SEQ_BN: Preset = Preset {
    name: "seq_bn",
    attention: false,
    input: BottleneckInput::Sum,
    reduction_factor: 16.0,
    non_linearity: "relu",
    scaling: 1.0,
    init: "bert",
};

const DOUBLE_SEQ_BN: Preset = Preset {
    name: "double_seq_bn",
    attention: true,
    input: BottleneckInput::Branch,
    non_linearity: "swish",
    ..SEQ_BN
};

const PAR_BN: Preset = Preset {
    name: "par_bn",
    input: BottleneckInput::Stream,
    reduction_factor: 2.0,
    scaling: 4.0,
    init: "mam_adapter",
    ..SEQ_BN
};

#[derive(Clone, Debug, PartialEq)]
pub struct BottleneckConfig {
    /// The adapter's name, part of its parameters' names.
    pub name: String,
    pub attention: bool,
    pub mlp: bool,
    pub input: BottleneckInput,
    pub reduction_factor: f64,
    /// adapter-hub's name of the activation.
    pub non_linearity: String,
    pub act: Act,
    pub scaling: f64,
    /// `init_weights`: bert (normal, standard deviation 0.02) or mam_adapter (up is zero).
    pub init: String,
    pub base: BottleneckBase,
}

/// The base model, as described in an adapter-hub folder.
#[derive(Clone, Debug, PartialEq)]
pub struct BottleneckBase {
    pub hidden_size: usize,
    pub model_class: String,
    pub model_type: String,
}

/// Checks that blocks normalise their input, not their output; the formulas above assume it.
pub(super) fn check_norms(model: &ModelConfig) -> Result<()> {
    if model.norm_place == NormPlace::Before {
        return Ok(());
    }
    Err(Error::Config(format!(
        "bottleneck adapters do not work with {}, whose blocks normalise what they add to the residual stream; use lora",
        model.family.model_type
    )))
}

impl BottleneckConfig {
    /// Configures a new adapter by the options, with adapter-hub's defaults for its type. Errors: a
    /// model that is not a language model, an impossible activation or reduction factor.
    pub fn from_keys(keys: &PeftConfig, model: &ModelConfig) -> Result<BottleneckConfig> {
        let preset = match keys.peft_type {
            PeftType::DoubleSeqBn => DOUBLE_SEQ_BN,
            PeftType::ParBn => PAR_BN,
            _ => SEQ_BN,
        };
        if model.task != Task::CausalLm {
            return Err(Error::Config(format!(
                "peft_type = {}: works only with language models; use lora",
                preset.name
            )));
        }
        let non_linearity = keys.non_linearity.as_deref().unwrap_or(preset.non_linearity);
        let reduction_factor = keys.reduction_factor.unwrap_or(preset.reduction_factor);
        let reduction_factor = factor(reduction_factor).map_err(Error::Config)?;
        Ok(BottleneckConfig {
            name: preset.name.into(),
            attention: preset.attention,
            mlp: true,
            input: preset.input,
            reduction_factor,
            non_linearity: non_linearity.into(),
            act: act(non_linearity).map_err(|e| Error::Config(format!("non_linearity: {e}")))?,
            scaling: preset.scaling,
            init: preset.init.into(),
            base: BottleneckBase {
                hidden_size: model.hidden_size,
                model_class: model.family.architecture.into(),
                model_type: model.family.model_type.into(),
            },
        })
    }

    /// Reads adapter-hub's adapter_config.json.
    pub fn from_json(path: &Path, raw: &Map<String, Value>) -> Result<BottleneckConfig> {
        let wrong = |message: String| Error::model(path, message);
        let config = raw.get("config").and_then(Value::as_object).cloned().unwrap_or_default();
        let on =
            |key: &str, default: bool| config.get(key).and_then(Value::as_bool).unwrap_or(default);
        for (key, plain) in [
            ("original_ln_after", true),
            ("residual_before_ln", true),
            ("ln_before", false),
            ("ln_after", false),
            ("use_gating", false),
            ("phm_layer", false),
            ("cross_adapter", false),
        ] {
            if config.get(key).is_some_and(|v| *v != json!(plain)) {
                return Err(wrong(format!(
                    "{key} = {}: only {plain} is supported here",
                    config[key]
                )));
            }
        }
        for key in ["inv_adapter", "leave_out", "dropout", "stochastic_depth"] {
            let none = [Value::Null, json!([]), json!(0.0), json!(0)];
            if config.get(key).is_some_and(|v| !none.contains(v)) {
                return Err(wrong(format!("{key} = {} is not supported here", config[key])));
            }
        }
        let number = |key: &str, default: f64| match config.get(key) {
            None => Ok(default),
            Some(v) => v
                .as_f64()
                .filter(|v| *v > 0.0)
                .ok_or_else(|| wrong(format!("{key} = {v}: give one number"))),
        };
        let outer =
            |key: &str| raw.get(key).and_then(Value::as_str).unwrap_or_default().to_string();
        let text = |key: &str| config.get(key).and_then(Value::as_str);
        let non_linearity = text("non_linearity").ok_or_else(|| {
            wrong(
                "is neither a PEFT config (it has no peft_type) nor a bottleneck adapter's".into(),
            )
        })?;
        let input = match (on("is_parallel", false), on("original_ln_before", false)) {
            (true, _) => BottleneckInput::Stream,
            (false, true) => BottleneckInput::Sum,
            (false, false) => BottleneckInput::Branch,
        };
        Ok(BottleneckConfig {
            name: raw.get("name").and_then(Value::as_str).unwrap_or("default").into(),
            attention: on("mh_adapter", false),
            mlp: on("output_adapter", true),
            input,
            reduction_factor: number("reduction_factor", 16.0)
                .and_then(|r| factor(r).map_err(wrong))?,
            non_linearity: non_linearity.into(),
            act: act(non_linearity).map_err(wrong)?,
            scaling: number("scaling", 1.0)?,
            init: text("init_weights").unwrap_or("bert").into(),
            base: BottleneckBase {
                hidden_size: raw.get("hidden_size").and_then(Value::as_u64).unwrap_or(0) as usize,
                model_class: outer("model_class"),
                model_type: outer("model_type"),
            },
        })
    }

    /// Returns adapter-hub's adapter_config.json: `raw` as read, updated with this config. `base`
    /// is the name of the model.
    pub fn to_json(&self, raw: &Map<String, Value>, base: &str) -> Map<String, Value> {
        let whole = |v: f64| if v.fract() == 0.0 { json!(v as i64) } else { json!(v) };
        let mut out = raw.clone();
        let config = json!({
            "adapter_residual_before_ln": false, "cross_adapter": false, "dropout": 0.0,
            "init_weights": self.init, "init_weights_seed": null, "inv_adapter": null,
            "inv_adapter_reduction_factor": null, "is_parallel": self.input == BottleneckInput::Stream, "leave_out": [],
            "ln_after": false, "ln_before": false, "mh_adapter": self.attention, "non_linearity": self.non_linearity,
            "original_ln_after": true, "original_ln_before": self.input == BottleneckInput::Sum, "output_adapter": self.mlp,
            "phm_layer": false, "reduction_factor": whole(self.reduction_factor), "residual_before_ln": true,
            "scaling": self.scaling, "stochastic_depth": 0.0, "use_gating": false,
        });
        for (key, value) in [
            ("config", config),
            ("hidden_size", json!(self.base.hidden_size)),
            ("model_class", json!(self.base.model_class)),
            ("model_name", json!(base)),
            ("model_type", json!(self.base.model_type)),
            ("name", json!(self.name)),
            ("version", json!("adapters.1.3.0")),
        ] {
            out.insert(key.into(), value);
        }
        out
    }

    /// Lists every parameter, under adapter-hub's names.
    pub fn params(&self, model: &ModelConfig) -> Vec<ParamSpec> {
        let hidden = model.hidden_size;
        let narrow = ((hidden as f64 / self.reduction_factor).floor() as usize).max(1);
        let places = [
            (BottleneckSite::Attention, "attention_adapters", self.attention),
            (BottleneckSite::Mlp, "output_adapters", self.mlp),
        ];
        let mut specs = Vec::new();
        for layer in 0..model.num_layers {
            for (place, module, _) in places.iter().filter(|p| p.2) {
                for (part, name, shape) in [
                    (BottleneckPart::Down, "adapter_down.0.weight", vec![narrow, hidden]),
                    (BottleneckPart::Up, "adapter_up.weight", vec![hidden, narrow]),
                    (BottleneckPart::DownBias, "adapter_down.0.bias", vec![narrow]),
                    (BottleneckPart::UpBias, "adapter_up.bias", vec![hidden]),
                ] {
                    let name =
                        format!("model.layers.{layer}.{module}.adapters.{}.{name}", self.name);
                    specs.push(ParamSpec {
                        name,
                        shape,
                        role: Role::Bottleneck(*place, part),
                        layer: Some(layer),
                    });
                }
            }
        }
        specs
    }
}

/// Checks that the reduction factor gives a possible width.
fn factor(reduction: f64) -> std::result::Result<f64, String> {
    match (0.0625..=1_048_576.0).contains(&reduction) {
        true => Ok(reduction),
        false => Err(format!("reduction_factor = {reduction}: must be from 1/16 to 1048576")),
    }
}

fn act(name: &str) -> Result<Act, String> {
    match name {
        "relu" => Ok(Act::Relu),
        "swish" | "silu" => Ok(Act::Silu),
        "gelu" => Ok(Act::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" => Ok(Act::GeluTanh),
        other => Err(format!("\"{other}\" is not supported; use relu, swish, gelu or gelu_new")),
    }
}

/// One bottleneck adapter of a layer.
#[derive(Clone)]
pub struct Bottleneck {
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    input: BottleneckInput,
    act: Act,
    /// None: the scale is 1.
    scale: Option<Tensor>,
}

impl Bottleneck {
    pub(super) fn wire(
        cx: &Cx,
        config: &BottleneckConfig,
        params: &ParamSet,
        layer: usize,
        place: BottleneckSite,
    ) -> Result<Option<Bottleneck>> {
        let part = |part| params.fused(Some(layer), Role::Bottleneck(place, part));
        let (Some(down), Some(down_bias)) =
            (part(BottleneckPart::Down)?, part(BottleneckPart::DownBias)?)
        else {
            return Ok(None);
        };
        let (Some(up), Some(up_bias)) = (part(BottleneckPart::Up)?, part(BottleneckPart::UpBias)?)
        else {
            return Ok(None);
        };
        let scale = match config.scaling {
            1.0 => None,
            s => {
                let n = up.row_count();
                Some(Tensor::from_f32(
                    &cx.pool,
                    "adapter scale",
                    cx.dtype,
                    &[n],
                    &vec![s as f32; n],
                )?)
            }
        };
        Ok(Some(Bottleneck {
            down,
            down_bias,
            up,
            up_bias,
            input: config.input,
            act: config.act,
            scale,
        }))
    }

    /// Returns the tensor to add to the stream instead of `branch`.
    pub fn apply(&self, cx: &mut Cx, branch: &Tensor, stream: &Tensor) -> Result<Tensor> {
        let sum = match self.input {
            BottleneckInput::Sum => Some(add(cx, branch, stream)?),
            _ => None,
        };
        let z = match (&sum, self.input) {
            (Some(sum), _) => sum,
            (None, BottleneckInput::Stream) => stream,
            (None, _) => branch,
        };
        let narrow = linear(cx, z, &self.down, Some(&self.down_bias))?;
        let narrow = activation(cx, &narrow, self.act)?;
        let mut up = linear(cx, &narrow, &self.up, Some(&self.up_bias))?;
        if let Some(scale) = &self.scale {
            up = scale_columns(cx, &up, &[(0, scale.clone())], None, None)?;
        }
        add(cx, branch, &up)
    }
}
