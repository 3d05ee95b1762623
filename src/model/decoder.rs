//! The decoder: the one forward that training, scoring and generation share. Floor 3.
//!
//! Invariant: a row's result depends on its own sequence alone, and has the same bits whether it is computed in a packed
//! batch, in a prefill or one token at a time over a page table.

use std::path::Path;
use std::sync::Arc;

use crate::cx::Cx;
use crate::device::{DType, Layout};
use crate::error::{Error, Result};
use crate::model::batch::{Batch, Sequence};
use crate::model::config::{HiddenAct, ModelConfig};
use crate::model::families::{Role, expected_params};
use crate::model::folder;
use crate::model::kv::{KvCache, KvStep};
use crate::model::params::ParamSet;
use crate::model::rope::rope_table;
use crate::ops::activation::{Act, glu};
use crate::ops::attention::{AttnPlan, AttnShape, attention, attention_paged, kv_append};
use crate::ops::embedding::{embedding, gather_rows};
use crate::ops::head::head_logps;
use crate::ops::matmul::{linear, product};
use crate::ops::rmsnorm::{add_rmsnorm, rmsnorm};
use crate::ops::rope::{QkNorm, RopeTable, rope};
use crate::tensor::Tensor;

pub struct Decoder {
    pub config: ModelConfig,
    pub params: ParamSet,
    embed: Tensor,
    layers: Vec<Layer>,
    final_norm: Tensor,
    /// [vocab, hidden]: the embedding itself where it is tied.
    pub head: Tensor,
    table: RopeTable,
    positions: usize,
}

struct Layer {
    input_norm: Tensor,
    qkv: Tensor,
    qkv_bias: Option<Tensor>,
    q_norm: Option<Tensor>,
    k_norm: Option<Tensor>,
    o: Tensor,
    o_bias: Option<Tensor>,
    post_norm: Tensor,
    gate_up: Tensor,
    gate_up_bias: Option<Tensor>,
    down: Tensor,
    down_bias: Option<Tensor>,
    shape: AttnShape,
}

/// Where a forward's keys and values are.
enum Keys<'a> {
    Batch(&'a Arc<AttnPlan>),
    Cache(&'a KvCache, &'a KvStep),
}

impl Decoder {
    /// Reads a Hugging Face folder; `positions` is the longest sequence that will be asked for (it can grow).
    pub fn load(cx: &Cx, set: u32, dir: impl AsRef<Path>, positions: usize) -> Result<Decoder> {
        let config = folder::load_config(&dir)?;
        let decoder = Decoder::new(cx, set, config, positions)?;
        let mut values = Vec::new();
        let mut at = 0;
        folder::load_weights(&dir, &decoder.config, &mut |spec, view| {
            // One tensor at a time passes through the host: never a second copy of the model.
            values.resize(view.len(), 0.0);
            view.to_f32_into(&mut values)?;
            let found = decoder.params.specs.iter().find(|(s, _)| s.name == spec.name);
            let (spec, offset) = found.ok_or_else(|| Error::model(&dir, format!("{} has no place", spec.name)))?;
            at += 1;
            decoder.params.store(spec, *offset, &values)
        })?;
        Ok(decoder)
    }

    /// A decoder with zero weights; [`ParamSet::initialise`] or a load fills them.
    pub fn new(cx: &Cx, set: u32, config: ModelConfig, positions: usize) -> Result<Decoder> {
        let params = ParamSet::new(cx, set, expected_params(&config))?;
        let mut layers = Vec::new();
        for i in 0..config.num_layers {
            let l = Some(i);
            layers.push(Layer {
                input_norm: params.required(l, Role::InputNorm)?,
                qkv: params.required(l, Role::Q)?,
                qkv_bias: params.unit(l, Role::QBias)?,
                q_norm: params.unit(l, Role::QNorm)?,
                k_norm: params.unit(l, Role::KNorm)?,
                o: params.required(l, Role::O)?,
                o_bias: params.unit(l, Role::OBias)?,
                post_norm: params.required(l, Role::PostNorm)?,
                gate_up: params.required(l, Role::Gate)?,
                gate_up_bias: params.unit(l, Role::GateBias)?,
                down: params.required(l, Role::Down)?,
                down_bias: params.unit(l, Role::DownBias)?,
                shape: AttnShape {
                    heads: config.num_heads,
                    kv_heads: config.num_kv_heads,
                    head_dim: config.head_dim,
                    scale: (config.head_dim as f32).powf(-0.5),
                    softcap: None,
                    window: config.sliding_window[i],
                },
            });
        }
        let embed = params.required(None, Role::Embed)?;
        let head = params.unit(None, Role::Head)?.unwrap_or_else(|| embed.clone());
        let final_norm = params.required(None, Role::FinalNorm)?;
        let table = upload_table(cx, &config, positions)?;
        Ok(Decoder { config, params, embed, layers, final_norm, head, table, positions })
    }

    /// Makes the rope table cover sequences of `n` tokens.
    pub fn ensure_positions(&mut self, cx: &Cx, n: usize) -> Result<()> {
        if n > self.positions {
            self.table = upload_table(cx, &self.config, n)?;
            self.positions = n;
        }
        Ok(())
    }

    /// Final hidden states of every row (after the last norm): [rows, hidden] real. With `checkpoint`, each layer is a
    /// segment of the tape that is computed again on the way back.
    pub fn hidden(&self, cx: &mut Cx, batch: &Batch, checkpoint: bool) -> Result<Tensor> {
        if batch.longest > self.positions {
            let message = format!("a sequence of {} tokens; the rope table covers {}", batch.longest, self.positions);
            return Err(Error::op("decoder", message));
        }
        let x = embedding(cx, &self.embed, &batch.tokens)?;
        self.run(cx, x, &batch.positions, Keys::Batch(&batch.plan), checkpoint)
    }

    /// Hidden states of the rows that predict a target: [targets, hidden].
    pub fn target_hidden(&self, cx: &mut Cx, batch: &Batch, checkpoint: bool) -> Result<Tensor> {
        let hidden = self.hidden(cx, batch, checkpoint)?;
        if batch.target_rows.numel() == batch.rows {
            return Ok(hidden);
        }
        gather_rows(cx, &hidden, &batch.target_rows)
    }

    /// Log-probs of the targets of each sequence, in order (all tokens but the first, where no mask is given). No tape.
    pub fn logps(&self, cx: &mut Cx, sequences: &[Sequence]) -> Result<Vec<Vec<f32>>> {
        let batch = Batch::new(cx, sequences, self.config.vocab_size)?;
        if batch.target_ids.is_empty() {
            return Ok(vec![Vec::new(); sequences.len()]);
        }
        let hidden = self.target_hidden(cx, &batch, false)?;
        let all = head_logps(cx, &hidden, &self.head, &batch.targets, 1.0)?.logp.to_f32()?;
        let mut rest = all.as_slice();
        let mut rows = Vec::with_capacity(sequences.len());
        for n in &batch.targets_of {
            let (row, tail) = rest.split_at(*n);
            rows.push(row.to_vec());
            rest = tail;
        }
        Ok(rows)
    }

    /// One step over the cache: appends the step's tokens, returns their hidden states. No tape.
    pub fn cached(&self, cx: &mut Cx, cache: &KvCache, step: &KvStep) -> Result<Tensor> {
        if step.longest > self.positions {
            let message = format!("a sequence of {} tokens; the rope table covers {}", step.longest, self.positions);
            return Err(Error::op("decoder", message));
        }
        let x = embedding(cx, &self.embed, &step.tokens)?;
        self.run(cx, x, &step.positions, Keys::Cache(cache, step), false)
    }

    /// Logits of hidden rows, F32 [rows, vocab].
    pub fn logits(&self, cx: &Cx, hidden: &Tensor) -> Result<Tensor> {
        let logits = cx.float("logits", &[hidden.row_count(), self.head.row_count()])?;
        product(cx, Layout::NT, &logits, hidden, &self.head, None, false)?;
        Ok(logits)
    }

    fn run(&self, cx: &mut Cx, x: Tensor, positions: &Tensor, keys: Keys, checkpoint: bool) -> Result<Tensor> {
        let eps = self.config.rms_norm_eps;
        let mut stream = x;
        let mut branch: Option<Tensor> = None;
        for (i, layer) in self.layers.iter().enumerate() {
            if let (true, Some(tape)) = (checkpoint, cx.tape.as_mut()) {
                tape.begin_segment();
            }
            let (s, b) = self.layer(cx, i, layer, stream, branch, positions, &keys)?;
            (stream, branch) = (s, Some(b));
            if let (true, Some(tape)) = (checkpoint, cx.tape.as_mut()) {
                tape.end_segment();
            }
        }
        match branch {
            Some(b) => Ok(add_rmsnorm(cx, &b, &stream, &self.final_norm, eps)?.0),
            None => rmsnorm(cx, &stream, &self.final_norm, eps),
        }
    }

    /// One block. `branch` is what the block before has computed and not yet added to the stream: the addition is fused
    /// with the norm that follows it. Returns (stream, branch) in the same sense.
    #[allow(clippy::too_many_arguments)]
    fn layer(
        &self,
        cx: &mut Cx,
        i: usize,
        layer: &Layer,
        stream: Tensor,
        branch: Option<Tensor>,
        positions: &Tensor,
        keys: &Keys,
    ) -> Result<(Tensor, Tensor)> {
        let eps = self.config.rms_norm_eps;
        let (normed, stream) = match branch {
            Some(b) => add_rmsnorm(cx, &b, &stream, &layer.input_norm, eps)?,
            None => (rmsnorm(cx, &stream, &layer.input_norm, eps)?, stream),
        };
        let shape = layer.shape;
        let qkv = linear(cx, &normed, &layer.qkv, layer.qkv_bias.as_ref())?;
        drop(normed);
        let norm = match (&layer.q_norm, &layer.k_norm) {
            (Some(q), Some(k)) => Some(QkNorm { q, k, eps }),
            _ => None,
        };
        let qkv = rope(cx, &qkv, &self.table, positions, shape.heads, shape.kv_heads, norm)?;
        let mixed = match keys {
            Keys::Batch(plan) => attention(cx, &qkv, plan, shape)?,
            Keys::Cache(cache, step) => {
                let cache = &cache.layers[i];
                kv_append(cx, &qkv, cache, &step.slots, shape.kv_heads, shape.head_dim, shape.heads)?;
                attention_paged(cx, &qkv, cache, &step.page_table, &step.row_sequence, &step.positions, shape)?
            }
        };
        drop(qkv);
        let attended = linear(cx, &mixed, &layer.o, layer.o_bias.as_ref())?;
        drop(mixed);
        let (normed, stream) = add_rmsnorm(cx, &attended, &stream, &layer.post_norm, eps)?;
        let gate_up = linear(cx, &normed, &layer.gate_up, layer.gate_up_bias.as_ref())?;
        let act = match self.config.hidden_act {
            HiddenAct::Silu => Act::Silu,
            HiddenAct::Gelu => Act::Gelu,
            HiddenAct::GeluTanh => Act::GeluTanh,
        };
        let gated = glu(cx, &gate_up, act)?;
        drop(gate_up);
        let out = linear(cx, &gated, &layer.down, layer.down_bias.as_ref())?;
        Ok((stream, out))
    }
}

fn upload_table(cx: &Cx, config: &ModelConfig, positions: usize) -> Result<RopeTable> {
    let (cos, sin) = rope_table(&config.rope, config.head_dim, positions);
    let shape = [positions, config.head_dim / 2];
    Ok(RopeTable {
        cosine: Tensor::from_host(&cx.pool, "rope table", DType::F32, &shape, &cos)?,
        sine: Tensor::from_host(&cx.pool, "rope table", DType::F32, &shape, &sin)?,
    })
}
