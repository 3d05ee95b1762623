//! The policy loss and PPO's value loss. Layer 4.
//!
//! Invariant: only the loss carries a gradient; the other outputs are for metrics.

use super::oracle;
use super::term::{PolicyLoss, Term};
use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream, flat};
use crate::device::Launch;
use crate::error::{Error, Result};
use crate::kernels::{self, policy_term};
use crate::ops::same_length;
use crate::tensor::{Id, Tensor};

/// The inputs, F32 `[n]` unless noted. The tokens of a sequence are contiguous.
pub struct PolicyInputs<'a> {
    /// Carries the gradient.
    pub logp: &'a Tensor,
    /// None: the policy has not moved since sampling (`logp` itself, ratio 1).
    pub old_logp: Option<&'a Tensor>,
    pub advantage: &'a Tensor,
    /// The mask times the normaliser of the loss type.
    pub weight: &'a Tensor,
    /// Required if beta is not 0.
    pub ref_logp: Option<&'a Tensor>,
    /// Factor of a token's loss term but not of its KL: importance correction, off-policy mask,
    /// entropy mask.
    pub scale: Option<&'a Tensor>,
    /// Vespo only, `[sequences]`: the log of the correction from the sampler's distribution.
    pub log_is: Option<&'a Tensor>,
    /// I32 [sequences + 1]: the first token of each sequence; from 0 to n.
    pub starts: &'a Tensor,
}

/// The outputs of a policy loss. Only `loss` carries a gradient.
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

/// `loss = sum_t weight_t (scale_t term_t + beta kl_t)`. Error if shapes differ, or if only one of
/// beta and `ref_logp` is given.
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
    let [loss, ratio, kl, clip] = cx.apply_many(Policy { config: *config, more }, &inputs)?;
    Ok(PolicyOut { loss, ratio, kl, clip })
}

/// PPO's clipped value loss `sum_t weight_t / 2 max(...)`: F32 `[1]`, and F32 `[n]` that is 1 where
/// the clipped error is the larger (`val/clipfrac_avg`). `value` carries the gradient; all inputs
/// are F32 `[n]`.
pub fn value_loss(
    cx: &mut Cx,
    value: &Tensor,
    old_value: &Tensor,
    returns: &Tensor,
    weight: &Tensor,
    cliprange: f32,
) -> Result<(Tensor, Tensor)> {
    cx.apply_many(ValueLoss { cliprange }, &[value, old_value, returns, weight]).map(Into::into)
}

/// The op: inputs logp, logp again as a constant, old, advantage, weight, starts, then those of
/// `more` that are present.
#[derive(Debug)]
pub(super) struct Policy {
    pub config: PolicyLoss,
    /// ref_logp, scale, log_is
    pub more: [bool; 3],
}

#[derive(Debug)]
pub(super) struct ValueLoss {
    pub cliprange: f32,
}

impl Policy {
    fn optional<'a, T>(&self, x: &[&'a T]) -> [Option<&'a T>; 3] {
        let mut rest = x[6..].iter().copied();
        self.more.map(|there| if there { rest.next() } else { None })
    }
}

impl Op for Policy {
    fn name(&self) -> &'static str {
        "policy_loss"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let (logp, starts) = (x[0], x[5]);
        let [ref_logp, scale, log_is] = self.optional(x);
        let (n, sequences) = (logp.numel(), starts.numel().saturating_sub(1));
        let rows = [x[2], x[3], x[4]].into_iter().chain([ref_logp, scale].into_iter().flatten());
        same_length("policy_loss", logp, rows)?;
        if log_is.is_some_and(|t| t.numel() != sequences) {
            let message = format!("log_is has not one value a sequence ({sequences})");
            return Err(Error::op("policy_loss", message));
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
        let [pos_a, neg_a, pos_b, neg_b] = self.config.shapes();
        let args = kernels::PolicyLossArgs {
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
        };
        kernels::policy_loss(&*cx.device, Launch::warps(sequences), d as usize, args)?;
        let args = kernels::SumAllArgs { out: loss.out(), x: &partial, n: sequences as i32 };
        kernels::sum_all(&*cx.device, Launch::warps(1), args)?;
        let saved = vec![dlogp];
        Ok(Fwd { outputs: vec![loss, ratio, kl, clip], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        scaled_gradient(cx, node, dy, g)
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let x: Vec<&F64> = x.iter().collect();
        oracle::loss(&self.config, &x, self.optional(&x))
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, 4 * x[0].bytes())
    }
}

impl Op for ValueLoss {
    fn name(&self) -> &'static str {
        "value_loss"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        same_length("value_loss", x[0], x[1..].iter().copied())?;
        let n = x[0].numel();
        let chunks = n.div_ceil(kernels::VALUE_CHUNK);
        let (clip, dvalue) = (cx.float("clip", &[n])?, cx.float("value gradient", &[n])?);
        let (partial, loss) =
            (cx.float("partial sums", &[chunks.max(1)])?, cx.float("loss", &[1])?);
        let (at, range) = (Launch::warps(chunks), self.cliprange);
        let (part, dv) = (partial.out(), dvalue.out());
        let args = kernels::ValueLossArgs {
            part,
            clip: clip.out(),
            dvalue: dv,
            value: x[0],
            old: x[1],
            returns: x[2],
            weight: x[3],
            n: n as i32,
            range,
        };
        kernels::value_loss(&*cx.device, at, args)?;
        let args = kernels::SumAllArgs { out: loss.out(), x: &partial, n: chunks as i32 };
        kernels::sum_all(&*cx.device, Launch::warps(1), args)?;
        Ok(Fwd { outputs: vec![loss, clip], saved: vec![dvalue] })
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

/// The first input's gradient: the upstream of the loss times the gradient saved by the forward.
fn scaled_gradient(cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
    let Some(up) = &dy[0] else { return Ok(()) };
    let Some((dx, accumulate)) = g.slot(0)? else { return Ok(()) };
    let (saved, n) = (&node.saved[0], node.saved[0].numel());
    let args = kernels::ScaleByUpstreamArgs {
        dx: dx.out(),
        saved,
        upstream: up,
        n: n as i64,
        accumulate: i32::from(accumulate),
    };
    kernels::scale_by_upstream(&*cx.device, flat(saved), args)
}
