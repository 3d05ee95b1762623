//! The losses of online RL on log-probs: the GRPO family, RLOO and PPO's policy term in one op;
//! PPO's value loss. Layer 4.
//!
//! Invariant: the gradient is made in the forward, with the loss, and scaled by its upstream later;
//! the normaliser of a loss type lies in the tokens' weights, and a token of weight 0 is masked.
//! Math, numerics and sources: `kernels/policy.cu`; advantages on the device:
//! [`crate::ops::policy::gae`] and [`crate::ops::policy::whiten`].

mod advantage;
mod oracle;

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream, flat};
use crate::config::value::words;
use crate::device::Launch;
use crate::error::{Error, Result};
use crate::kernels::{self, policy_term, ratio_level};
use crate::tensor::{Id, Tensor};

pub use advantage::{gae, whiten};
pub use oracle::{cases, perf};

/// The term of a token. TRL's `loss_type` grpo, bnpo, dr_grpo, dapo and luspo are all `Clip`: they
/// differ in the weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Term {
    /// PPO's clipped ratio; `delta` bounds the ratio from above on both sides (infinity: not at
    /// all).
    Clip {
        epsilon: f32,
        epsilon_high: f32,
        delta: f32,
    },
    /// The ratio, bounded by `epsilon_high` itself (not 1 + it), as a constant.
    Cispo {
        epsilon_high: f32,
    },
    Sapo {
        temperature_pos: f32,
        temperature_neg: f32,
    },
    Vespo {
        k_pos: f32,
        lambda_pos: f32,
        k_neg: f32,
        lambda_neg: f32,
    },
}

words! {
    /// What a ratio belongs to: TRL's `importance_sampling_level`.
    pub enum ImportanceLevel {
        Token = "token" => ratio_level::TOKEN,
        /// The mean of the log-ratios.
        Sequence = "sequence" => ratio_level::SEQUENCE,
        /// Their sum, as in RLOO.
        SequenceSum = "sequence_sum" => ratio_level::SEQUENCE_SUM,
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicyLoss {
    pub term: Term,
    pub level: ImportanceLevel,
    /// Coefficient of the KL divergence from `ref_logp`.
    pub beta: f32,
    /// TRL's `use_bias_correction_kl`: the divergence times the ratio.
    pub bias_correction_kl: bool,
}

/// The inputs, F32 `[n]` unless said otherwise. Tokens of a sequence lie side by side.
pub struct PolicyInputs<'a> {
    /// Carries the gradient.
    pub logp: &'a Tensor,
    /// None: the policy has not moved since (`logp` itself, ratio 1).
    pub old_logp: Option<&'a Tensor>,
    pub advantage: &'a Tensor,
    /// Mask times the loss type's normaliser.
    pub weight: &'a Tensor,
    /// Needed where beta is not 0.
    pub ref_logp: Option<&'a Tensor>,
    /// Factor of a token's term but not of its KL: importance correction, off-policy mask, entropy
    /// mask.
    pub scale: Option<&'a Tensor>,
    /// Vespo only, `[sequences]`: the log of the correction from the sampler's distribution.
    pub log_is: Option<&'a Tensor>,
    /// I32 [sequences + 1]: where sequences start; from 0 to n.
    pub starts: &'a Tensor,
}

/// Figures of a step. Only `loss` carries a gradient.
pub struct PolicyOut {
    /// F32 `[1]`
    pub loss: Tensor,
    /// F32 `[n]`: the ratio; with `Vespo` its weight phi
    pub ratio: Tensor,
    /// F32 `[n]`: 0 without `ref_logp`
    pub kl: Tensor,
    /// F32 `[n]`: 1 clipped low, 2 clipped high, else 0 (`clip_ratio/*`, `cispo_clip_ratio`)
    pub clip: Tensor,
}

/// `loss = sum_t weight_t (scale_t term_t + beta kl_t)`. Error if shapes differ, or beta is set
/// without `ref_logp`.
pub fn policy_loss(cx: &mut Cx, config: &PolicyLoss, x: &PolicyInputs) -> Result<PolicyOut> {
    if (config.beta != 0.0) != x.ref_logp.is_some() {
        return Err(Error::op(
            "policy_loss",
            "a KL term needs both beta and ref_logp; give both or neither",
        ));
    }
    let now = x.logp.clone().with_id(Id::Constant);
    let mut inputs =
        vec![x.logp, &now, x.old_logp.unwrap_or(&now), x.advantage, x.weight, x.starts];
    inputs.extend([x.ref_logp, x.scale, x.log_is].into_iter().flatten());
    let more = [x.ref_logp.is_some(), x.scale.is_some(), x.log_is.is_some()];
    match <[Tensor; 4]>::try_from(cx.apply(Policy { config: *config, more }, &inputs)?) {
        Ok([loss, ratio, kl, clip]) => Ok(PolicyOut { loss, ratio, kl, clip }),
        Err(_) => Err(Error::op("policy_loss", "gave no outputs")),
    }
}

/// PPO's clipped value loss `sum_t weight_t / 2 max(...)`: F32 `[1]`, and F32 `[n]` that is 1 where
/// the clipped error counts (`val/clipfrac_avg`). `value` carries the gradient; all are F32 `[n]`.
pub fn value_loss(
    cx: &mut Cx,
    value: &Tensor,
    old_value: &Tensor,
    returns: &Tensor,
    weight: &Tensor,
    cliprange: f32,
) -> Result<(Tensor, Tensor)> {
    let mut out = cx.apply(ValueLoss { cliprange }, &[value, old_value, returns, weight])?;
    match (out.pop(), out.pop()) {
        (Some(clip), Some(loss)) => Ok((loss, clip)),
        _ => Err(Error::op("value_loss", "gave no outputs")),
    }
}

/// The op: inputs logp, logp again as a constant, old, advantage, weight, starts, then those of
/// `more` that are there.
#[derive(Debug)]
struct Policy {
    config: PolicyLoss,
    /// ref_logp, scale, log_is
    more: [bool; 3],
}

#[derive(Debug)]
struct ValueLoss {
    cliprange: f32,
}

impl Policy {
    fn optional<'a, T>(&self, x: &[&'a T]) -> [Option<&'a T>; 3] {
        let mut rest = x[6..].iter().copied();
        self.more.map(|there| if there { rest.next() } else { None })
    }

    /// Of a positive and of a negative advantage: (temperature or k, lambda).
    fn shapes(&self) -> [f32; 4] {
        match self.config.term {
            Term::Sapo { temperature_pos, temperature_neg } => {
                [temperature_pos, temperature_neg, 0.0, 0.0]
            }
            Term::Vespo { k_pos, lambda_pos, k_neg, lambda_neg } => {
                [k_pos, k_neg, lambda_pos, lambda_neg]
            }
            _ => [0.0; 4],
        }
    }
}

impl Op for Policy {
    fn name(&self) -> &'static str {
        "policy_loss"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
        let (logp, starts) = (x[0], x[5]);
        let [ref_logp, scale, log_is] = self.optional(x);
        let (n, sequences) = (logp.numel(), starts.numel().saturating_sub(1));
        let rows = [x[2], x[3], x[4]].into_iter().chain([ref_logp, scale].into_iter().flatten());
        same_length("policy_loss", logp, rows)?;
        if log_is.is_some_and(|t| t.numel() != sequences) {
            return Err(Error::op(
                "policy_loss",
                format!("log_is has not one value a sequence ({sequences})"),
            ));
        }
        let of = |name: &str, len: usize| cx.float(name, &[len]);
        let (ratio, kl, clip, dlogp) =
            (of("ratio", n)?, of("kl", n)?, of("clip", n)?, of("policy gradient", n)?);
        let (partial, loss) = (of("partial sums", sequences.max(1))?, of("loss", 1)?);
        let (d, low, high, delta) = match self.config.term {
            Term::Clip { epsilon, epsilon_high, delta } => {
                (policy_term::CLIP, epsilon, epsilon_high, delta)
            }
            Term::Cispo { epsilon_high } => (policy_term::CISPO, 0.0, epsilon_high, f32::INFINITY),
            Term::Sapo { .. } => (policy_term::SAPO, 0.0, 0.0, f32::INFINITY),
            Term::Vespo { .. } => (policy_term::VESPO, 0.0, 0.0, f32::INFINITY),
        };
        let [pos_a, neg_a, pos_b, neg_b] = self.shapes();
        kernels::policy_loss(
            &*cx.device,
            Launch::warps(sequences),
            d as usize,
            kernels::PolicyLossArgs {
                seq_loss: partial.out(),
                ratio: ratio.out(),
                kl: kl.out(),
                clip: clip.out(),
                dlogp: dlogp.out(),
                logp,
                old: x[2],
                advantage: x[3],
                weight: x[4],
                ref_logp,
                scale,
                log_is,
                starts,
                sequences: sequences as i32,
                level: self.config.level as i32,
                low,
                high,
                delta,
                beta: self.config.beta,
                bias_correction: i32::from(self.config.bias_correction_kl),
                pos_a,
                neg_a,
                pos_b,
                neg_b,
            },
        )?;
        kernels::sum_all(
            &*cx.device,
            Launch::warps(1),
            kernels::SumAllArgs { out: loss.out(), x: &partial, n: sequences as i32 },
        )?;
        let saved = if need.tape { vec![dlogp] } else { vec![] };
        Ok(Fwd { outputs: vec![loss, ratio, kl, clip], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        scaled_gradient(cx, node, dy, g)
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        oracle::loss(self, &x.iter().collect::<Vec<_>>())
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, 4 * x[0].bytes())
    }
}

impl Op for ValueLoss {
    fn name(&self) -> &'static str {
        "value_loss"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
        same_length("value_loss", x[0], x[1..].iter().copied())?;
        let n = x[0].numel();
        let chunks = n.div_ceil(kernels::VALUE_CHUNK);
        let (clip, dvalue) = (cx.float("clip", &[n])?, cx.float("value gradient", &[n])?);
        let (partial, loss) =
            (cx.float("partial sums", &[chunks.max(1)])?, cx.float("loss", &[1])?);
        let (at, range) = (Launch::warps(chunks), self.cliprange);
        let (part, dv) = (partial.out(), dvalue.out());
        kernels::value_loss(
            &*cx.device,
            at,
            kernels::ValueLossArgs {
                part,
                clip: clip.out(),
                dvalue: dv,
                value: x[0],
                old: x[1],
                returns: x[2],
                weight: x[3],
                n: n as i32,
                range,
            },
        )?;
        kernels::sum_all(
            &*cx.device,
            Launch::warps(1),
            kernels::SumAllArgs { out: loss.out(), x: &partial, n: chunks as i32 },
        )?;
        Ok(Fwd { outputs: vec![loss, clip], saved: if need.tape { vec![dvalue] } else { vec![] } })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        scaled_gradient(cx, node, dy, g)
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let (mut loss, mut clip) = (F64::zeros(&[1]), F64::zeros(&x[0].shape));
        let range = f64::from(self.cliprange);
        for i in 0..x[0].data.len() {
            let [v, old, r, w] = [0, 1, 2, 3].map(|k| x[k].data[i]);
            let (plain, clipped) =
                ((v - r).powi(2), (v.clamp(old - range, old + range) - r).powi(2));
            loss.data[0] += if w == 0.0 { 0.0 } else { 0.5 * w * plain.max(clipped) };
            clip.data[i] = f64::from(u8::from(clipped > plain));
        }
        vec![loss, clip]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, 2 * x[0].bytes())
    }
}

/// The first input's gradient: the upstream of the loss times what the forward kept.
fn scaled_gradient(cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
    let Some(up) = &dy[0] else { return Ok(()) };
    let Some((dx, accumulate)) = g.slot(0)? else { return Ok(()) };
    let (saved, n) = (&node.saved[0], node.saved[0].numel());
    kernels::scale_by_upstream(
        &*cx.device,
        flat(saved),
        kernels::ScaleByUpstreamArgs {
            dx: dx.out(),
            saved,
            upstream: up,
            n: n as i64,
            accumulate: i32::from(accumulate),
        },
    )
}

fn same_length<'a>(
    op: &'static str,
    x: &Tensor,
    others: impl IntoIterator<Item = &'a Tensor>,
) -> Result<()> {
    match others.into_iter().find(|t| t.numel() != x.numel()) {
        Some(t) => Err(Error::op(op, format!("{t:?} has not one value for each of {x:?}"))),
        None => Ok(()),
    }
}
