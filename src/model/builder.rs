//! How a decoder is made: its initial weights, and the wiring of its layers, with an adapter or without.
//! Layer 5.
//!
//! Invariant: the adapter's copies of modules replace the model's own; a model without the weights that its
//! config asks for is an error.

#![deny(missing_docs)]

use std::path::Path;
use std::sync::Arc;

use crate::autograd::Cx;
use crate::device::DType;
use crate::error::{Error, Result};
use crate::model::adapter::Adapter;
use crate::model::decoder::{Decoder, Layer, LayerAttention, LayerConv, LayerMixer, upload_tables};
use crate::model::folder;
use crate::model::layout::{Mixer, ModelConfig, Task};
use crate::model::params::{ParamSet, initial};
use crate::model::projection::{Projection, Weight};
use crate::model::specs::{BottleneckSite, Proj, Role, expected_params};
use crate::ops::attention::AttnShape;
use crate::ops::head::Head;
use crate::ops::logit_map::LogitMap;
use crate::ops::quant::Scheme;
use crate::ops::rmsnorm::NormWeight;
use crate::ops::rope::RopeTable;
use crate::tensor::safetensors::HostDtype;
use crate::tensor::{ParamSetId, Tensor};

/// The initial weights of a new decoder.
#[derive(Clone, Copy, Debug)]
pub enum InitialWeights<'a> {
    /// A Hugging Face folder. A score that it lacks is normal(0, initializer_range).
    Folder(&'a Path),
    /// All zero.
    Zero,
    /// transformers' initial values, a function of the seed.
    Random {
        /// Seed of the random numbers.
        seed: u64,
    },
}

/// Options of a new [`Decoder`].
pub struct DecoderBuilder<'a> {
    config: ModelConfig,
    weights: InitialWeights<'a>,
    scheme: Option<Scheme>,
    set: ParamSetId,
    positions: usize,
}

impl<'a> DecoderBuilder<'a> {
    /// The config that the model is built from.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Sets the task, if it is not the config's.
    pub fn task(mut self, task: Task) -> Self {
        self.config.task = task;
        self
    }

    /// Sets the initial weights.
    pub fn weights(mut self, weights: InitialWeights<'a>) -> Self {
        self.weights = weights;
        self
    }

    /// With a scheme, linear layers are quantised while reading, and are frozen.
    pub fn storage(mut self, scheme: Option<Scheme>) -> Self {
        self.scheme = scheme;
        self
    }

    /// Sets the parameter set of the weights.
    pub fn set(mut self, set: ParamSetId) -> Self {
        self.set = set;
        self
    }

    /// Sets the longest sequence that the rope tables cover initially.
    pub fn positions(mut self, positions: usize) -> Self {
        self.positions = positions;
        self
    }

    /// Allocates and fills the weights. Errors: missing or wrong weights in the folder, out of
    /// memory.
    pub fn build(self, cx: &Cx) -> Result<Decoder> {
        let config = self.config;
        let std = config.initializer_range;
        let mut params = ParamSet::stored(cx, self.set, expected_params(&config), self.scheme)?;
        // Reading weights takes time, and a memory plan needs only their size.
        let weights = match cx.device.computes() {
            true => self.weights,
            false => InitialWeights::Zero,
        };
        match weights {
            InitialWeights::Zero => params.zero_quantised(cx)?,
            InitialWeights::Random { seed } => {
                params.initialise(std, seed)?;
                if config.norm_weight == NormWeight::PlusOne {
                    for (i, spec) in params.specs.iter().enumerate().filter(|s| s.1.role.is_norm())
                    {
                        params.store(i, &vec![0.0; spec.len()])?;
                    }
                }
                params.initialise_quantised(cx, std, seed)?;
            }
            InitialWeights::Folder(dir) => {
                for (i, spec) in params.specs.iter().enumerate() {
                    if spec.role == Role::Score {
                        params.store(i, &initial(spec, i, std, 0))?;
                    }
                }
                let mut values = Vec::new();
                folder::load_weights(dir, &config, &mut |spec, view| {
                    // Upload the mapped file's bytes if they have the storage dtype; otherwise
                    // convert one tensor at a time on the host, never a second copy of the model.
                    let stored = match cx.dtype {
                        DType::BF16 => HostDtype::BF16,
                        _ => HostDtype::F32,
                    };
                    if view.dtype == stored && params.put_stored(&spec.name, view.bytes)? {
                        return Ok(());
                    }
                    values.resize(view.len(), 0.0);
                    view.to_f32_into(&mut values)?;
                    params.put(cx, &spec.name, &values)
                })?;
            }
        }
        let tables = upload_tables(cx, &config, self.positions)?;
        Decoder::wire(config, params, None, tables, self.positions)
    }
}

impl Decoder {
    /// Loads the model of a Hugging Face folder. Call [`Decoder::ensure_positions`] before the
    /// first forward; for other options see [`Decoder::folder`] and [`Decoder::builder`].
    pub fn load(cx: &Cx, dir: impl AsRef<Path>) -> Result<Decoder> {
        Decoder::folder(&dir)?.build(cx)
    }

    /// Returns a builder for the model of a Hugging Face folder. Errors: those of the folder's
    /// config.json.
    pub fn folder(dir: &(impl AsRef<Path> + ?Sized)) -> Result<DecoderBuilder<'_>> {
        let dir = dir.as_ref();
        Ok(Decoder::builder(folder::load_config(dir)?).weights(InitialWeights::Folder(dir)))
    }

    /// Returns a builder for a model with this config. Defaults: zero weights in the context's
    /// dtype, the set of the trained model, sequences of one token (see
    /// [`Decoder::ensure_positions`]).
    pub fn builder<'a>(config: ModelConfig) -> DecoderBuilder<'a> {
        DecoderBuilder {
            config,
            weights: InitialWeights::Zero,
            scheme: None,
            set: ParamSetId::Model,
            positions: 1,
        }
    }

    /// Assembles the model: the adapter's copies of modules replace the model's own.
    fn wire(
        config: ModelConfig,
        params: ParamSet,
        adapter: Option<Adapter>,
        tables: Vec<RopeTable>,
        positions: usize,
    ) -> Result<Decoder> {
        let fused = |layer, role| -> Result<Option<Tensor>> {
            let own = adapter.as_ref().map(|a| a.params.fused(layer, role)).transpose()?.flatten();
            if own.is_some() { Ok(own) } else { params.fused(layer, role) }
        };
        let need = |layer, role| {
            fused(layer, role)?
                .ok_or_else(|| Error::op("decoder", format!("no {role:?} in layer {layer:?}")))
        };
        let mut layers = Vec::new();
        for i in 0..config.num_layers {
            let l = Some(i);
            let projection = |leader: Proj, bias| -> Result<Projection> {
                let site = adapter.as_ref().and_then(|a| a.site(i, leader)).cloned();
                let weight = match params.quantised(l, leader.role()) {
                    Some(quantised) => Weight::Quantised(quantised.clone()),
                    None => Weight::Dense(need(l, leader.role())?),
                };
                Ok(Projection { weight, bias: fused(l, bias)?, site })
            };
            layers.push(Layer {
                input_norm: fused(l, Role::InputNorm)?,
                attention_out_norm: fused(l, Role::AttentionOutNorm)?,
                post_norm: fused(l, Role::PostNorm)?,
                mlp_out_norm: fused(l, Role::MlpOutNorm)?,
                mixer: match config.mixers[i] {
                    Mixer::Attention => LayerMixer::Attention(LayerAttention {
                        qkv: projection(Proj::Q, Role::QBias)?,
                        q_norm: fused(l, Role::QNorm)?,
                        k_norm: fused(l, Role::KNorm)?,
                        o: projection(Proj::O, Role::OBias)?,
                        shape: AttnShape {
                            heads: config.num_heads,
                            kv_heads: config.num_kv_heads,
                            head_dim: config.head_dim,
                            scale: config.attention_scale,
                            softcap: config.attention_softcap,
                            window: config.sliding_window[i],
                        },
                        rope: config.layer_rope[i],
                    }),
                    Mixer::ShortConv { .. } => LayerMixer::ShortConv(LayerConv {
                        input: projection(Proj::ConvIn, Role::ConvInBias)?,
                        filters: need(l, Role::Conv)?,
                        bias: fused(l, Role::ConvBias)?,
                        out: projection(Proj::ConvOut, Role::ConvOutBias)?,
                    }),
                },
                after_attention: adapter
                    .as_ref()
                    .and_then(|a| a.bottleneck(i, BottleneckSite::Attention))
                    .cloned(),
                gate_up: projection(Proj::Gate, Role::GateBias)?,
                down: projection(Proj::Down, Role::DownBias)?,
                after_mlp: adapter
                    .as_ref()
                    .and_then(|a| a.bottleneck(i, BottleneckSite::Mlp))
                    .cloned(),
            });
        }
        let embed = need(None, Role::Embed)?;
        let (weight, map) = match config.task {
            // A tied head uses the model's own embedding even if the adapter trains a copy of it
            // (as in PEFT), unless the adapter keeps them tied.
            Task::CausalLm => match fused(None, Role::Head)? {
                Some(head) => (head, config.logits),
                None if adapter.as_ref().is_some_and(Adapter::ties_head) => {
                    (embed.clone(), config.logits)
                }
                None => (params.required(None, Role::Embed)?, config.logits),
            },
            _ => (need(None, Role::Score)?, LogitMap::PLAIN),
        };
        let pair = adapter.as_ref().and_then(|a| a.head.clone());
        let head = Head { weight, map, pair };
        let embed_pair = adapter.as_ref().and_then(|a| a.embedding.clone());
        let score_bias = fused(None, Role::ScoreBias)?;
        let final_norm = need(None, Role::FinalNorm)?;
        let prompt = fused(None, Role::Prompt)?;
        Ok(Decoder {
            config,
            params,
            adapter,
            embed,
            embed_pair,
            prompt,
            layers,
            final_norm,
            head,
            score_bias,
            tables,
            positions,
            wiring: Arc::new(()),
        })
    }

    /// Returns the model with this adapter (None: without its adapter).
    pub fn with_adapter(self, adapter: Option<Adapter>) -> Result<Decoder> {
        Decoder::wire(self.config, self.params, adapter, self.tables, self.positions)
    }

    /// Returns a classifier on this model's own weights, which stay unchanged: `adapter`, made for
    /// this task, provides the score and replaces the model's adapter.
    pub fn classifier(&self, task: Task, adapter: Adapter) -> Result<Decoder> {
        let config = ModelConfig { task, ..self.config.clone() };
        let (params, tables) = (self.params.clone(), self.tables.clone());
        Decoder::wire(config, params, Some(adapter), tables, self.positions)
    }

    /// Returns the model in its current state, as the reference of a preference or RL method. If
    /// the adapter starts at zero this is the base itself, without a second copy; else a frozen
    /// copy of the trained parameters.
    pub fn reference(&self, cx: &Cx) -> Result<Decoder> {
        match &self.adapter {
            Some(a) if a.starts_at_zero() => self.clone().with_adapter(None),
            Some(a) => {
                let copy = a.reference(cx, &self.config)?;
                copy.refresh(cx, &self.params)?;
                self.clone().with_adapter(Some(copy))
            }
            None => {
                let params = self.params.reference(cx)?;
                let tables = self.tables.clone();
                Decoder::wire(self.config.clone(), params, None, tables, self.positions)
            }
        }
    }
}
