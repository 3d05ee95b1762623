//! The decoder: the forward pass that training, scoring and generation share. Layer 5.
//!
//! Invariant: a row's result depends on its own sequence only, and has the same bits in a packed
//! batch, in a prefill, and token by token with a page table.

#![deny(missing_docs)]

use std::sync::Arc;

use crate::autograd::{Cx, Recompute};
use crate::device::DType;
use crate::error::{Error, Result};
use crate::model::adapter::bottleneck::Bottleneck;
use crate::model::adapter::{Adapter, EmbeddingPair};
use crate::model::batch::{Batch, Sequence, Vocab};
use crate::model::kv::{KvCache, KvStep};
use crate::model::layout::{HiddenAct, ModelConfig};
use crate::model::params::ParamSet;
use crate::model::projection::Projection;
use crate::model::rope::{RopeConfig, rope_table};
use crate::ops::activation::{Act, glu};
use crate::ops::add::add;
use crate::ops::attention::{AttnPlan, AttnShape, attention, attention_decode, attention_paged};
use crate::ops::embedding::{TokenIndex, embedding, gather_rows};
use crate::ops::head::{Head, LogitRows, head_logps};
use crate::ops::linear_glu::linear_glu;
use crate::ops::matmul::linear;
use crate::ops::mlp::{DenseLayer, mlp};
use crate::ops::norm_linear::norm_linear;
use crate::ops::prompt::prompt_embedding;
use crate::ops::rmsnorm::{NormInput, rmsnorm};
use crate::ops::rope::{QkNorm, RopeTable, rope};
use crate::ops::rope_append::rope_append;
use crate::ops::scale::multiply;
use crate::ops::short_conv::{ConvRows, short_conv};
use crate::ops::short_conv_paged::short_conv_paged;
use crate::tensor::Tensor;

/// A model on its device; clones share the weights.
#[derive(Clone)]
pub struct Decoder {
    /// Sizes and kinds of the layers.
    pub config: ModelConfig,
    /// The model's own weights. With an adapter they are frozen: see [`Decoder::trained`].
    pub params: ParamSet,
    /// The adapter that is trained instead of the weights, if any.
    pub adapter: Option<Adapter>,
    pub(super) embed: Tensor,
    pub(super) embed_pair: Option<EmbeddingPair>,
    /// [virtual tokens, hidden]: the rows of prompt tuning, which precede every sequence.
    pub(super) prompt: Option<Tensor>,
    pub(super) layers: Vec<Layer>,
    pub(super) final_norm: Tensor,
    /// [vocab, hidden]: the embedding itself if tied. Of a classifier: its score.
    pub head: Head,
    pub(super) score_bias: Option<Tensor>,
    /// One for each of the config's `ropes`.
    pub(super) tables: Vec<RopeTable>,
    pub(super) positions: usize,
    /// Shared by clones only, which read the same memory: see [`Decoder::same_memory`].
    pub(super) wiring: Arc<()>,
}

#[derive(Clone)]
pub(super) struct Layer {
    /// Norms of the input and output of attention, then of the MLP; the layout determines which a
    /// block has.
    pub(super) input_norm: Option<Tensor>,
    pub(super) attention_out_norm: Option<Tensor>,
    pub(super) post_norm: Option<Tensor>,
    pub(super) mlp_out_norm: Option<Tensor>,
    pub(super) mixer: LayerMixer,
    pub(super) after_attention: Option<Bottleneck>,
    pub(super) gate_up: Projection,
    pub(super) down: Projection,
    pub(super) after_mlp: Option<Bottleneck>,
}

/// The token mixer of a layer.
#[derive(Clone)]
pub(super) enum LayerMixer {
    Attention(LayerAttention),
    ShortConv(LayerConv),
}

#[derive(Clone)]
pub(super) struct LayerConv {
    pub(super) input: Projection,
    pub(super) filters: Tensor,
    pub(super) bias: Option<Tensor>,
    pub(super) out: Projection,
}

#[derive(Clone)]
pub(super) struct LayerAttention {
    pub(super) qkv: Projection,
    pub(super) q_norm: Option<Tensor>,
    pub(super) k_norm: Option<Tensor>,
    pub(super) o: Projection,
    pub(super) shape: AttnShape,
    /// Index of the rope table that rotates q and k; None: no rope.
    pub(super) rope: Option<usize>,
}

/// The source of the tokens before each row.
enum Keys<'a> {
    /// With the rows of convolutions, if the model has any.
    Batch(&'a Arc<AttnPlan>, Option<&'a ConvRows>),
    Cache(&'a KvCache, &'a KvStep),
}

impl Decoder {
    /// The parameters that training updates: the adapter's if there is one, else the model's.
    pub fn trained(&self) -> &ParamSet {
        self.adapter.as_ref().map_or(&self.params, |a| &a.params)
    }

    /// Recomputes the values derived from the parameters; call it after they change.
    pub fn refresh(&self, cx: &Cx) -> Result<()> {
        self.adapter.as_ref().map_or(Ok(()), |a| a.refresh(cx, &self.params))
    }

    /// The ids that the model accepts: tokens and, with prompt tuning, virtual tokens after them.
    pub fn vocab(&self) -> Vocab {
        let virtuals = self.prompt.as_ref().map_or(0, Tensor::row_count);
        Vocab { tokens: self.config.vocab_size, virtuals }
    }

    /// Longest sequence that the rope tables cover, virtual tokens included.
    pub fn positions(&self) -> usize {
        self.positions
    }

    fn embed(&self, cx: &mut Cx, tokens: &TokenIndex) -> Result<Tensor> {
        let scale = self.config.embedding_scale.map(|s| s.factors(self.params.weights.dtype()));
        let (of_tokens, of_all) = scale.unwrap_or((1.0, 1.0));
        let (x, rest) = match &self.prompt {
            Some(p) => (prompt_embedding(cx, &self.embed, p, tokens, of_tokens)?, of_all),
            None => (embedding(cx, &self.embed, tokens)?, of_tokens * of_all), // one of them is 1
        };
        let x = match &self.embed_pair {
            Some(pair) => {
                let low = embedding(cx, &pair.a, tokens)?;
                let low = if pair.scale == 1.0 { low } else { multiply(cx, &low, pair.scale)? };
                let low = linear(cx, &low, &pair.b, None)?;
                add(cx, &x, &low)?
            }
            None => x,
        };
        if rest == 1.0 { Ok(x) } else { multiply(cx, &x, rest) }
    }

    /// Extends the rope tables to sequences of `n` tokens. The first length given to a model (here
    /// or by its builder) determines longrope's factors for good, since the results of a run must
    /// not depend on what else it computes. Error: `n` needs the other factors.
    pub fn ensure_positions(&mut self, cx: &Cx, n: usize) -> Result<()> {
        if n > self.positions {
            let flips = |r: &RopeConfig| r.is_long(n) && !r.is_long(self.positions);
            if self.positions > 1 && self.config.ropes.iter().any(flips) {
                let message = format!(
                    "a sequence of {n} tokens is longer than longrope's original length, but \
                     this run began with the factors for shorter ones, and a run uses one set of \
                     factors; limit the length of its sequences"
                );
                return Err(Error::op("decoder", message));
            }
            self.tables = upload_tables(cx, &self.config, n)?;
            self.positions = n;
            self.wiring = Arc::new(());
        }
        Ok(())
    }

    /// Like [`Decoder::ensure_positions`], for a separate run that shares no results with earlier
    /// ones: it may switch longrope's factors.
    pub fn begin_run(&mut self, cx: &Cx, n: usize) -> Result<()> {
        let other = |r: &RopeConfig| r.is_long(n) != r.is_long(self.positions);
        if self.config.ropes.iter().any(other) {
            self.positions = 1;
        }
        self.ensure_positions(cx, n.max(2))
    }

    /// Whether forwards of both models read the same memory: one is a clone of the other, and
    /// neither was rewired since. Then a recorded forward of one can be replayed as a forward of
    /// the other, with the current weights.
    pub fn same_memory(&self, other: &Decoder) -> bool {
        Arc::ptr_eq(&self.wiring, &other.wiring)
    }

    /// Returns the final hidden states of every row (after the last norm): [rows, hidden] real.
    /// With [`Recompute::Layers`] each layer is a segment of the tape that the backward recomputes.
    pub fn hidden(&self, cx: &mut Cx, batch: &Batch) -> Result<Tensor> {
        if batch.longest > self.positions {
            let message = format!(
                "a sequence of {} tokens is longer than the rope table, which covers {}",
                batch.longest, self.positions
            );
            return Err(Error::op("decoder", message));
        }
        if batch.vocab.virtuals != self.vocab().virtuals {
            let (theirs, ours) = (batch.vocab.virtuals, self.vocab().virtuals);
            let message =
                format!("a batch behind {theirs} virtual tokens, the model's prompt has {ours}");
            return Err(Error::op(
                "decoder",
                message + "; this method does not support prompt tuning: use another peft_type",
            ));
        }
        let x = self.embed(cx, &batch.tokens)?;
        let taps = self.config.conv_taps();
        let rows = taps.map(|taps| ConvRows::new(cx, &batch.plan.segments, taps)).transpose()?;
        self.run(cx, x, &batch.positions, Keys::Batch(&batch.plan, rows.as_ref()))
    }

    /// Returns the hidden states of the rows that predict a target: [targets, hidden].
    pub fn target_hidden(&self, cx: &mut Cx, batch: &Batch) -> Result<Tensor> {
        let hidden = self.hidden(cx, batch)?;
        if batch.target_rows.numel() == batch.rows {
            return Ok(hidden);
        }
        gather_rows(cx, &hidden, &batch.target_rows)
    }

    /// Returns the log-probs of the targets of each sequence, in order (all tokens but the first if
    /// no mask is given). No tape.
    pub fn logps(&self, cx: &mut Cx, sequences: &[Sequence]) -> Result<Vec<Vec<f32>>> {
        let batch = Batch::new(cx, sequences, self.vocab())?;
        if batch.target_ids.is_empty() {
            return Ok(vec![Vec::new(); sequences.len()]);
        }
        let hidden = self.target_hidden(cx, &batch)?;
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

    /// Runs one step with the cache: appends the step's tokens and returns their hidden states. No
    /// tape, and only launches, so the step can be recorded.
    pub fn cached(&self, cx: &mut Cx, cache: &KvCache, step: &KvStep) -> Result<Tensor> {
        if step.longest > self.positions {
            let message = format!(
                "a sequence of {} tokens is longer than the rope table, which covers {}",
                step.longest, self.positions
            );
            return Err(Error::op("decoder", message));
        }
        if step.vocab != self.vocab().total() {
            let message =
                format!("a step for {} ids, the model has {:?}", step.vocab, self.vocab());
            return Err(Error::op(
                "decoder",
                message + "; give the engine the model that it was made for",
            ));
        }
        let x = self.embed(cx, &step.tokens)?;
        self.run(cx, x, &step.positions, Keys::Cache(cache, step))
    }

    /// Returns the scores of a classifier for hidden rows: [rows, labels] real.
    pub fn scores(&self, cx: &mut Cx, hidden: &Tensor) -> Result<Tensor> {
        linear(cx, hidden, &self.head.weight, self.score_bias.as_ref())
    }

    /// Returns the logits of hidden rows, F32 [rows, vocab].
    pub fn logits(&self, cx: &Cx, hidden: &Tensor) -> Result<Tensor> {
        self.head.logits(cx, hidden)
    }

    /// The same for the sampler (see [`Head::rows_to_sample`]).
    pub fn rows_to_sample(&self, cx: &Cx, hidden: &Tensor, plain: bool) -> Result<LogitRows> {
        self.head.rows_to_sample(cx, hidden, plain)
    }

    fn run(&self, cx: &mut Cx, x: Tensor, positions: &Tensor, keys: Keys) -> Result<Tensor> {
        let mut stream = x;
        let mut branch: Option<Tensor> = None;
        for (i, layer) in self.layers.iter().enumerate() {
            if let (Recompute::Layers, Some(tape)) = (cx.recompute, cx.tape.as_mut()) {
                tape.begin_segment();
            }
            let (s, b) = self.layer(cx, i, layer, stream, branch, positions, &keys)?;
            (stream, branch) = (s, Some(b));
            if let (Recompute::Layers, Some(tape)) = (cx.recompute, cx.tape.as_mut()) {
                tape.end_segment();
            }
        }
        Ok(self.enter(cx, stream, branch, Some(&self.final_norm))?.0)
    }

    /// [`Decoder::enter`] and a projection of the module's input: the projection's output, and the
    /// stream.
    fn project(
        &self,
        cx: &mut Cx,
        stream: Tensor,
        branch: Option<Tensor>,
        norm: Option<&Tensor>,
        to: &Projection,
    ) -> Result<(Tensor, Tensor)> {
        if let (Some(weight), Some(layer)) = (norm, to.dense()) {
            let input = self.norm_input(&stream, branch.as_ref(), weight);
            if input.fits(cx, layer.weight) {
                return norm_linear(cx, input, layer, None);
            }
        }
        let (input, stream) = self.enter(cx, stream, branch, norm)?;
        Ok((to.apply(cx, &input)?, stream))
    }

    /// The norm of the stream plus the branch.
    fn norm_input<'a>(
        &self,
        stream: &'a Tensor,
        branch: Option<&'a Tensor>,
        weight: &'a Tensor,
    ) -> NormInput<'a> {
        let norm = self.config.norm();
        match branch {
            Some(branch) => NormInput { x: branch, residual: Some(stream), weight, norm },
            None => NormInput { x: stream, residual: None, weight, norm },
        }
    }

    /// Adds the pending branch to the stream. Returns the input of the next module, normalised if
    /// it has a norm, and the stream.
    fn enter(
        &self,
        cx: &mut Cx,
        stream: Tensor,
        branch: Option<Tensor>,
        norm: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        match (branch, norm) {
            (branch, Some(w)) => self.norm_input(&stream, branch.as_ref(), w).rows(cx),
            (Some(b), None) => {
                let sum = add(cx, &stream, &b)?;
                Ok((sum.clone(), sum))
            }
            (None, None) => Ok((stream.clone(), stream)),
        }
    }

    /// Returns what to add to the stream, from the output of attention or the MLP.
    fn leave(&self, cx: &mut Cx, out: Tensor, norm: Option<&Tensor>) -> Result<Tensor> {
        let out = match norm {
            Some(w) => rmsnorm(cx, &out, w, self.config.norm())?,
            None => out,
        };
        match self.config.residual_scale {
            1.0 => Ok(out),
            factor => multiply(cx, &out, factor),
        }
    }

    /// Runs one block. `branch` is the previous block's output that was not yet added to the
    /// stream: the addition is fused with the next norm. Returns (stream, branch) in the same
    /// sense.
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
        let norm = layer.input_norm.as_ref();
        let (mut attended, stream) = match &layer.mixer {
            LayerMixer::Attention(attention) => {
                let (qkv, stream) = self.project(cx, stream, branch, norm, &attention.qkv)?;
                (self.attend(cx, i, attention, qkv, positions, keys, &layer.gate_up)?, stream)
            }
            LayerMixer::ShortConv(conv) => {
                let (bcx, stream) = self.project(cx, stream, branch, norm, &conv.input)?;
                (convolve(cx, i, conv, bcx, keys)?, stream)
            }
        };
        if let Some(adapter) = &layer.after_attention {
            attended = adapter.apply(cx, &attended, &stream)?;
        }
        let branch = self.leave(cx, attended, layer.attention_out_norm.as_ref())?;
        let (mut out, stream) = self.mlp(cx, layer, stream, branch)?;
        if let Some(adapter) = &layer.after_mlp {
            out = adapter.apply(cx, &out, &stream)?;
        }
        let branch = self.leave(cx, out, layer.mlp_out_norm.as_ref())?;
        Ok((stream, branch))
    }

    /// The MLP of a layer and the norm before it: the MLP's output, and the stream.
    fn mlp(
        &self,
        cx: &mut Cx,
        layer: &Layer,
        stream: Tensor,
        branch: Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let act = match self.config.hidden_act {
            HiddenAct::Silu => Act::Silu,
            HiddenAct::Gelu => Act::Gelu,
            HiddenAct::GeluTanh => Act::GeluTanh,
        };
        let norm = layer.post_norm.as_ref();
        if let (Some(weight), Some(gate_up)) = (norm, layer.gate_up.dense()) {
            let input = self.norm_input(&stream, Some(&branch), weight);
            if input.fits(cx, gate_up.weight) {
                let (gated, stream) = norm_linear(cx, input, gate_up, Some(act))?;
                return Ok((layer.down.apply(cx, &gated)?, stream));
            }
        }
        let (x, stream) = self.enter(cx, stream, Some(branch), norm)?;
        let gated = match (layer.gate_up.dense(), layer.down.dense()) {
            (Some(gate_up), Some(down)) => return Ok((mlp(cx, &x, gate_up, down, act)?, stream)),
            (Some(DenseLayer { weight, bias }), None) => linear_glu(cx, &x, weight, bias, act)?,
            (None, _) => {
                let gate_up = layer.gate_up.apply(cx, &x)?;
                glu(cx, &gate_up, act)?
            }
        };
        Ok((layer.down.apply(cx, &gated)?, stream))
    }

    /// Attention of layer `i`, from q | k | v to the output of its output projection. `after`: the
    /// projection that follows it.
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        cx: &mut Cx,
        i: usize,
        layer: &LayerAttention,
        qkv: Tensor,
        positions: &Tensor,
        keys: &Keys,
        after: &Projection,
    ) -> Result<Tensor> {
        let shape = layer.shape;
        let norm = match (&layer.q_norm, &layer.k_norm, self.config.qk_norm) {
            (Some(q), Some(k), Some(over)) => Some(QkNorm { q, k, norm: self.config.norm(), over }),
            _ => None,
        };
        let (heads, kv_heads) = (shape.heads, shape.kv_heads);
        let table = layer.rope.map(|k| &self.tables[k]);
        let mixed = match keys {
            Keys::Batch(plan, _) => {
                let qkv = rope(cx, &qkv, table, positions, heads, kv_heads, norm)?;
                attention(cx, &qkv, plan, shape)?
            }
            Keys::Cache(cache, step) => {
                let (cache, rows) = (&cache.layers[i], step.rows());
                if step.decodes {
                    let next = [&layer.o, after].map(|to| to.dense().map(|dense| dense.weight));
                    attention_decode(cx, &qkv, cache, table, norm, rows, shape, next)?
                } else {
                    let slots = rows.slots;
                    rope_append(cx, &qkv, cache, table, positions, slots, heads, kv_heads, norm)?;
                    attention_paged(cx, &qkv, cache, rows, shape)?
                }
            }
        };
        drop(qkv);
        layer.o.apply(cx, &mixed)
    }
}

/// The gated convolution of layer `i`, from the output of its input projection to that of its output
/// projection.
fn convolve(cx: &mut Cx, i: usize, layer: &LayerConv, bcx: Tensor, keys: &Keys) -> Result<Tensor> {
    let (filters, bias) = (&layer.filters, layer.bias.as_ref());
    let mixed = match keys {
        Keys::Batch(_, Some(rows)) => short_conv(cx, &bcx, filters, bias, rows)?,
        Keys::Batch(_, None) => {
            return Err(Error::op("decoder", "a convolution without its rows"));
        }
        Keys::Cache(cache, step) => {
            short_conv_paged(cx, &bcx, &cache.layers[i], filters, bias, step.rows())?
        }
    };
    drop(bcx);
    layer.out.apply(cx, &mixed)
}

pub(super) fn upload_tables(
    cx: &Cx,
    config: &ModelConfig,
    positions: usize,
) -> Result<Vec<RopeTable>> {
    let upload = |shape: &[usize], values: &[f32]| {
        Tensor::from_host(&cx.pool, "rope table", DType::F32, shape, values)
    };
    let table = |rope: &RopeConfig| {
        let long = rope.is_long(positions);
        let (cos, sin) = rope_table(rope, config.head_dim, positions, long);
        let shape = [positions, rope.turned(config.head_dim) / 2];
        let scales = rope.query_scales(positions);
        Ok(RopeTable {
            cosine: upload(&shape, &cos)?,
            sine: upload(&shape, &sin)?,
            q_scale: scales.map(|scales| upload(&[positions], &scales)).transpose()?,
        })
    };
    config.ropes.iter().map(table).collect()
}
