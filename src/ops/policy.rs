//! The losses of online RL on log-probs: the GRPO family, RLOO and PPO's policy term in one op; PPO's value loss. Floor 2.
//!
//! Invariant: the gradient is made in the forward, with the loss, and scaled by its upstream later; the normaliser of a
//! loss type lies in the tokens' weights, and a token of weight 0 is masked. Math, numerics and sources:
//! `kernels/policy.cu`; advantages on the device: [`crate::ops::policy::gae`] and [`crate::ops::policy::whiten`].

mod advantage;

use crate::cx::Cx;
use crate::device::{Launch, kernels};
use crate::error::{Error, Result};
use crate::ops::{Arg, Case, Cost, F64, Fwd, Need, Op, Rng, Round};
use crate::tape::{Grads, Node};
use crate::tensor::{Id, Tensor};

pub use advantage::{gae, whiten};

/// The term of a token. TRL's `loss_type` grpo, bnpo, dr_grpo, dapo and luspo are all `Clip`: they differ in the weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Term {
    /// PPO's clipped ratio; `delta` bounds the ratio from above on both sides (infinity: not at all).
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

/// What a ratio belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Token,
    /// TRL's `importance_sampling_level="sequence"`: the mean of the log-ratios.
    Sequence,
    /// RLOO: their sum.
    SequenceSum,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicyLoss {
    pub term: Term,
    pub level: Level,
    /// Coefficient of the KL divergence from `ref_logp`.
    pub beta: f32,
    /// TRL's `use_bias_correction_kl`: the divergence times the ratio.
    pub bias_correction_kl: bool,
}

/// The inputs, F32 [n] unless said otherwise. Tokens of a sequence lie side by side.
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
    /// Factor of a token's term but not of its KL: importance correction, off-policy mask, entropy mask.
    pub scale: Option<&'a Tensor>,
    /// Vespo only, [sequences]: the log of the correction from the sampler's distribution.
    pub log_is: Option<&'a Tensor>,
    /// I32 [sequences + 1]: where sequences start; from 0 to n.
    pub starts: &'a Tensor,
}

/// Figures of a step. Only `loss` carries a gradient.
pub struct PolicyOut {
    /// F32 [1]
    pub loss: Tensor,
    /// F32 [n]: the ratio; with `Vespo` its weight phi
    pub ratio: Tensor,
    /// F32 [n]: 0 without `ref_logp`
    pub kl: Tensor,
    /// F32 [n]: 1 clipped low, 2 clipped high, else 0 (`clip_ratio/*`, `cispo_clip_ratio`)
    pub clip: Tensor,
}

/// `loss = sum_t weight_t (scale_t term_t + beta kl_t)`. Error if shapes differ, or beta is set without `ref_logp`.
pub fn policy_loss(cx: &mut Cx, config: &PolicyLoss, x: &PolicyInputs) -> Result<PolicyOut> {
    if (config.beta != 0.0) != x.ref_logp.is_some() {
        return Err(Error::op("policy_loss", "a KL term needs both beta and ref_logp; give both or neither"));
    }
    let now = x.logp.clone().with_id(Id::Constant);
    let mut inputs = vec![x.logp, &now, x.old_logp.unwrap_or(&now), x.advantage, x.weight, x.starts];
    inputs.extend([x.ref_logp, x.scale, x.log_is].into_iter().flatten());
    let more = [x.ref_logp.is_some(), x.scale.is_some(), x.log_is.is_some()];
    match <[Tensor; 4]>::try_from(cx.apply(Policy { config: *config, more }, &inputs)?) {
        Ok([loss, ratio, kl, clip]) => Ok(PolicyOut { loss, ratio, kl, clip }),
        Err(_) => Err(Error::op("policy_loss", "gave no outputs")),
    }
}

/// PPO's clipped value loss `sum_t weight_t / 2 max(...)`: F32 [1], and F32 [n] that is 1 where the clipped error counts
/// (`val/clipfrac_avg`). `value` carries the gradient; all are F32 [n].
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

/// The op: inputs logp, logp again as a constant, old, advantage, weight, starts, then those of `more` that are there.
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
            Term::Sapo { temperature_pos, temperature_neg } => [temperature_pos, temperature_neg, 0.0, 0.0],
            Term::Vespo { k_pos, lambda_pos, k_neg, lambda_neg } => [k_pos, k_neg, lambda_pos, lambda_neg],
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
            return Err(Error::op("policy_loss", format!("log_is has not one value a sequence ({sequences})")));
        }
        let of = |name: &str, len: usize| cx.float(name, &[len]);
        let (ratio, kl, clip, dlogp) = (of("ratio", n)?, of("kl", n)?, of("clip", n)?, of("policy gradient", n)?);
        let (partial, loss) = (of("partial sums", sequences.max(1))?, of("loss", 1)?);
        let (d, low, high, delta) = match self.config.term {
            Term::Clip { epsilon, epsilon_high, delta } => (0, epsilon, epsilon_high, delta),
            Term::Cispo { epsilon_high } => (1, 0.0, epsilon_high, f32::INFINITY),
            Term::Sapo { .. } => (2, 0.0, 0.0, f32::INFINITY),
            Term::Vespo { .. } => (3, 0.0, 0.0, f32::INFINITY),
        };
        let [pos_a, neg_a, pos_b, neg_b] = self.shapes();
        kernels::policy_loss(
            &*cx.device,
            Launch::warps(sequences),
            d,
            partial.out(),
            ratio.out(),
            kl.out(),
            clip.out(),
            dlogp.out(),
            logp,
            x[2],
            x[3],
            x[4],
            ref_logp,
            scale,
            log_is,
            starts,
            sequences as i32,
            self.config.level as i32,
            low,
            high,
            delta,
            self.config.beta,
            i32::from(self.config.bias_correction_kl),
            pos_a,
            neg_a,
            pos_b,
            neg_b,
        )?;
        kernels::sum_all(&*cx.device, Launch::warps(1), loss.out(), &partial, sequences as i32)?;
        let saved = if need.tape { vec![dlogp] } else { vec![] };
        Ok(Fwd { outputs: vec![loss, ratio, kl, clip], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &[Option<Tensor>], g: &mut Grads) -> Result<()> {
        scaled_gradient(cx, node, dy, g)
    }

    fn reference(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let refs: Vec<&F64> = x.iter().collect();
        reference(self, &refs)
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
        let chunks = n.div_ceil(1024).max(1);
        let (clip, dvalue) = (cx.float("clip", &[n])?, cx.float("value gradient", &[n])?);
        let (partial, loss) = (cx.float("partial sums", &[chunks])?, cx.float("loss", &[1])?);
        let (at, range) = (Launch::warps(chunks), self.cliprange);
        let (part, dv) = (partial.out(), dvalue.out());
        kernels::value_loss(&*cx.device, at, part, clip.out(), dv, x[0], x[1], x[2], x[3], n as i32, range)?;
        kernels::sum_all(&*cx.device, Launch::warps(1), loss.out(), &partial, n.div_ceil(1024) as i32)?;
        Ok(Fwd { outputs: vec![loss, clip], saved: if need.tape { vec![dvalue] } else { vec![] } })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &[Option<Tensor>], g: &mut Grads) -> Result<()> {
        scaled_gradient(cx, node, dy, g)
    }

    fn reference(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let (mut loss, mut clip) = (F64::zeros(&[1]), F64::zeros(&x[0].shape));
        let range = f64::from(self.cliprange);
        for i in 0..x[0].data.len() {
            let [v, old, r, w] = [0, 1, 2, 3].map(|k| x[k].data[i]);
            let (plain, clipped) = ((v - r).powi(2), (v.clamp(old - range, old + range) - r).powi(2));
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
fn scaled_gradient(cx: &mut Cx, node: &Node, dy: &[Option<Tensor>], g: &mut Grads) -> Result<()> {
    let Some(up) = &dy[0] else { return Ok(()) };
    let Some((dx, accumulate)) = g.slot(0)? else { return Ok(()) };
    let (saved, n) = (&node.saved[0], node.saved[0].numel());
    let at = Launch::flat(n.div_ceil(4));
    kernels::scale_by_upstream(&*cx.device, at, dx.out(), saved, up, n as i64, i32::from(accumulate))
}

fn same_length<'a>(op: &'static str, x: &Tensor, others: impl IntoIterator<Item = &'a Tensor>) -> Result<()> {
    match others.into_iter().find(|t| t.numel() != x.numel()) {
        Some(t) => Err(Error::op(op, format!("{t:?} has not one value for each of {x:?}"))),
        None => Ok(()),
    }
}

fn reference(op: &Policy, x: &[&F64]) -> Vec<F64> {
    let c = &op.config;
    let [logp, now, old, advantage, weight, starts] = [0, 1, 2, 3, 4, 5].map(|i| &x[i].data);
    let [ref_logp, scale, log_is] = op.optional(x);
    let n = logp.len();
    let mut loss = F64::zeros(&[1]);
    let (mut ratio, mut kl, mut clip) = (F64::zeros(&[n]), F64::zeros(&[n]), F64::zeros(&[n]));
    let [pos_a, neg_a, pos_b, neg_b] = op.shapes().map(f64::from);
    for s in 0..starts.len() - 1 {
        let tokens = starts[s] as usize..starts[s + 1] as usize;
        let kept: Vec<usize> = tokens.clone().filter(|t| weight[*t] != 0.0).collect();
        let log_ratio = |p: &[f64], t: usize| match c.level {
            Level::Token => p[t] - old[t],
            Level::Sequence => kept.iter().map(|t| p[*t] - old[*t]).sum::<f64>() / kept.len().max(1) as f64,
            Level::SequenceSum => kept.iter().map(|t| p[*t] - old[*t]).sum::<f64>(),
        };
        let correction = log_is.map_or(0.0, |l| l.data[s]);
        let log_w = kept.iter().map(|t| (now[*t] - old[*t]).clamp(-20.0, 20.0)).sum::<f64>() + correction;
        let log_w = log_w.clamp(1e-8f64.ln(), 20.0);
        for t in tokens {
            let (a, r) = (advantage[t], log_ratio(logp, t).exp());
            let held = log_ratio(now, t).exp();
            (ratio.data[t], clip.data[t]) = (r, 0.0);
            let term = match c.term {
                Term::Clip { epsilon, epsilon_high, delta } => {
                    let (low, high) = (1.0 - f64::from(epsilon), 1.0 + f64::from(epsilon_high));
                    let bounded = r.min(f64::from(delta));
                    clip.data[t] = match () {
                        () if bounded < low && a < 0.0 => 1.0,
                        () if bounded > high && a > 0.0 => 2.0,
                        () => 0.0,
                    };
                    -(bounded * a).min(r.clamp(low, high) * a)
                }
                Term::Cispo { epsilon_high } => {
                    clip.data[t] = if r > f64::from(epsilon_high) && a > 0.0 { 2.0 } else { 0.0 };
                    -held.min(f64::from(epsilon_high)) * a * logp[t]
                }
                Term::Sapo { .. } => {
                    let tau = if a > 0.0 { pos_a } else { neg_a };
                    -4.0 / tau * a / (1.0 + (-tau * (r - 1.0)).exp())
                }
                Term::Vespo { .. } => {
                    let (k, lambda) = if a >= 0.0 { (pos_a, pos_b) } else { (neg_a, neg_b) };
                    let lambda = lambda.max(1e-4);
                    let phi = (lambda + k * log_w - lambda * log_w.exp()).exp();
                    ratio.data[t] = phi;
                    -phi * a * logp[t]
                }
            };
            if let Some(reference) = ref_logp {
                let x = reference.data[t] - logp[t];
                kl.data[t] = (x.exp_m1() - x) * if c.bias_correction_kl { r } else { 1.0 };
            }
            if weight[t] != 0.0 {
                loss.data[0] += weight[t] * (scale.map_or(1.0, |s| s.data[t]) * term + f64::from(c.beta) * kl.data[t]);
            }
        }
    }
    vec![loss, ratio, kl, clip]
}

const CLIP: Term = Term::Clip { epsilon: 0.2, epsilon_high: 0.28, delta: f32::INFINITY };

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let two_sided = Term::Clip { epsilon: 0.2, epsilon_high: 0.2, delta: 1.7 };
    let vespo = Term::Vespo { k_pos: 2.0, lambda_pos: 3.0, k_neg: 3.0, lambda_neg: 2.0 };
    let terms = [
        ("clip", CLIP),
        ("two-sided clip", two_sided),
        ("cispo", Term::Cispo { epsilon_high: 1.3 }),
        ("sapo", Term::Sapo { temperature_pos: 1.0, temperature_neg: 1.05 }),
        ("vespo", vespo),
    ];
    let mut cases = Vec::new();
    for (name, term) in terms {
        for level in [Level::Token, Level::Sequence, Level::SequenceSum] {
            for more in [[false; 3], [true, true, term == vespo]] {
                for lengths in [&[1usize][..], &[5, 0, 131, 64, 1]] {
                    let config = PolicyLoss {
                        term,
                        level,
                        beta: if more[0] { 0.3 } else { 0.0 },
                        bias_correction_kl: level != Level::Sequence,
                    };
                    let label = format!("{name} {level:?} {} sequences more {}", lengths.len(), more[0]);
                    cases.push(Case {
                        upstream: upstream(),
                        ..Case::new(label, Policy { config, more }, inputs(rng, lengths, config, more))
                    });
                }
            }
        }
    }
    let plain = PolicyLoss { term: CLIP, level: Level::Token, beta: 0.1, bias_correction_kl: false };
    let more = [true, false, false];
    cases.push(Case {
        upstream: upstream(),
        ..Case::new("plain kl", Policy { config: plain, more }, inputs(rng, &[40, 3], plain, more))
    });
    for n in [1, 37, 2500] {
        let old = rng.array(&[n], 1.0);
        // away from the bounds of the clip, where the derivative jumps
        let value = F64::from_fn(&[n], |i| old.data[i] + [-0.5, -0.1, 0.1, 0.5][rng.below(4)] + 0.05 * rng.uniform());
        let returns = F64::from_fn(&[n], |i| old.data[i] + 2.0 * rng.normal());
        let arrays = [old, returns, weights(rng, n)].map(Arg::float);
        let inputs = [watched(value)].into_iter().chain(arrays).collect();
        cases.push(Case {
            upstream: vec![None, Some(0.0)],
            ..Case::new(format!("value {n}"), ValueLoss { cliprange: 0.2 }, inputs)
        });
    }
    cases.extend(advantage::cases(rng));
    cases
}

/// Only the loss has a gradient.
fn upstream() -> Vec<Option<f64>> {
    vec![None, Some(0.0), Some(0.0), Some(0.0)]
}

fn watched(value: F64) -> Arg {
    Arg { grad: true, ..Arg::float(value) }
}

/// About every fifth token is masked.
fn weights(rng: &mut Rng, n: usize) -> F64 {
    F64::from_fn(&[n], |i| if i > 0 && rng.below(5) == 0 { 0.0 } else { (0.5 + rng.uniform()) / n as f64 })
}

/// Log-ratios lie away from where a derivative jumps: clip bounds 0.8, 1.2, 1.28, 1.3 and 1.7.
fn inputs(rng: &mut Rng, lengths: &[usize], config: PolicyLoss, more: [bool; 3]) -> Vec<Arg> {
    const RATIOS: [f64; 6] = [0.55, 0.72, 0.9, 1.1, 1.45, 2.2];
    let n: usize = lengths.iter().sum();
    let (mut starts, mut old, mut advantage) = (vec![0], vec![], vec![]);
    let logp = F64::from_fn(&[n], |_| -0.2 - 2.0 * rng.uniform());
    let weight = weights(rng, n);
    for (s, len) in lengths.iter().enumerate() {
        let from = old.len();
        let kept = (from..from + len).filter(|t| weight.data[*t] != 0.0).count().max(1) as f64;
        let target = RATIOS[(s + 1) % RATIOS.len()].ln() / if config.level == Level::SequenceSum { kept } else { 1.0 };
        for t in from..from + len {
            let drawn = RATIOS[rng.below(RATIOS.len())].ln() + 0.02 * rng.uniform();
            old.push(
                logp.data[t]
                    - if config.level == Level::Token && !matches!(config.term, Term::Vespo { .. }) {
                        drawn
                    } else {
                        target
                    },
            );
            // positive more often, so that the loss is no difference of near equals
            advantage.push(if rng.below(3) == 0 { -0.3 } else { 1.0 } * (0.5 + rng.uniform()));
        }
        starts.push(old.len() as i32);
    }
    if matches!(config.term, Term::Vespo { .. }) {
        // phi is near 0 unless the sequence's ratio is near 1
        old = (0..n).map(|t| logp.data[t] + 0.02 * rng.normal()).collect();
    }
    let mut args = vec![watched(logp.clone()), Arg::float(logp.clone())];
    args.extend([F64::new(&[n], old), F64::new(&[n], advantage), weight].map(Arg::float));
    args.push(Arg::ints(&starts));
    if more[0] {
        args.push(Arg::float(F64::from_fn(&[n], |t| logp.data[t] + 0.6 * rng.normal())));
    }
    if more[1] {
        args.push(Arg::float(F64::from_fn(&[n], |_| [0.0, 1.0, 1.5][rng.below(3)])));
    }
    if more[2] {
        args.push(Arg::float(rng.array(&[lengths.len()], 0.2)));
    }
    args
}
