//! Policy losses and advantages against TRL 1.16.0's own code, PPO against f64
//! (`tests/fixtures/make_policy.py`).

use serde_json::Value;
use temper::autograd::{Cx, ParamGrads, Tape};
use temper::device::DType;
use temper::methods::online::advantage::{
    self, Advantages, KlEstimator, RewardAggregation, ScaleRewards,
};
use temper::methods::online::weights::{
    Normalizer, off_policy_mask, token_weights, top_entropy_mask,
};
use temper::ops::policy::{
    ImportanceLevel, PolicyInputs, PolicyLoss, PolicyOut, Term, gae, policy_loss, value_loss,
    whiten,
};
use temper::rewards::Scores;
use temper::tensor::{Id, ParamSetId, Tensor};

use crate::support::{cpu, fixture, floats, json};

fn singles(v: &Value) -> Vec<f32> {
    floats(v).into_iter().map(|v| v as f32).collect()
}

fn optional(v: &Value) -> Vec<Option<f64>> {
    v.as_array().unwrap().iter().map(Value::as_f64).collect()
}

fn lengths(f: &Value) -> Vec<usize> {
    floats(&f["lengths"]).into_iter().map(|v| v as usize).collect()
}

/// One value a sequence, for each of its tokens.
fn spread(values: &[f64], lengths: &[usize]) -> Vec<f64> {
    values.iter().zip(lengths).flat_map(|(v, n)| std::iter::repeat_n(*v, *n)).collect()
}

/// The largest difference, relative to the largest value.
fn distance(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(1e-30, |m: f64, v| m.max(v.abs()));
    got.iter()
        .zip(want)
        .fold(0.0, |m: f64, (a, b)| if a.is_nan() { f64::INFINITY } else { m.max((a - b).abs()) })
        / largest
}

struct Bench {
    cx: Cx,
}

impl Bench {
    fn new() -> Bench {
        Bench { cx: cpu() }
    }

    fn put(&self, data: &[f64]) -> Tensor {
        let data: Vec<f32> = data.iter().map(|v| *v as f32).collect();
        Tensor::from_f32(&self.cx.pool, "test", DType::F32, &[data.len()], &data).unwrap()
    }

    fn starts(&self, lengths: &[usize]) -> Tensor {
        let mut starts = vec![0i32];
        lengths.iter().for_each(|n| starts.push(starts[starts.len() - 1] + *n as i32));
        self.cx.ints("starts", &starts).unwrap()
    }

    /// Runs `f` on a taped `data`; the loss and its gradient by `data`.
    fn gradient(
        &mut self,
        data: &[f64],
        f: impl FnOnce(&mut Cx, &Tensor) -> Tensor,
    ) -> (f64, Vec<f64>) {
        let slot = Tensor::new(&self.cx.pool, "gradient", DType::F32, &[data.len()]).unwrap();
        let x = self.put(data).with_id(Id::Param { set: ParamSetId::Model, index: 0 });
        self.cx.param_grads[ParamSetId::Model] = ParamGrads::new(vec![Some(slot.clone())]);
        self.cx.tape = Some(Tape::default());
        let loss = f(&mut self.cx, &x);
        let one = self.put(&[1.0]);
        self.cx.backward(vec![(loss.clone(), one)]).unwrap();
        (host(&loss)[0], host(&slot))
    }
}

fn host(t: &Tensor) -> Vec<f64> {
    t.to_f32().unwrap().into_iter().map(f64::from).collect()
}

#[test]
fn grpo_losses_and_their_gradients_are_trls() {
    let f = json(fixture("policy.json"));
    let lengths = lengths(&f);
    let mut report = String::new();
    for case in f["grpo"].as_array().unwrap() {
        let worst = grpo_case(&f, case, &lengths);
        report += &format!("{worst:.1e} {}\n", case["config"]);
        // f32 on both sides: a few roundings of exp and of sums of some fifty terms
        assert!(worst < 1e-5, "{report}");
    }
    assert!(f["grpo"].as_array().unwrap().len() > 30);
    eprintln!("{report}");
}

fn grpo_case(f: &Value, case: &Value, lengths: &[usize]) -> f64 {
    let key = |k: &str| case["config"].get(k).unwrap_or(&f["defaults"][k]).clone();
    let number = |k: &str| key(k).as_f64();
    let (loss_type, level) = (key("loss_type"), key("level"));
    let loss_type = loss_type.as_str().unwrap();
    let sequences = floats(&f["advantage"]);
    let (logp, tool) = (floats(&f["logp"]), floats(&f["tool_mask"]));
    let masked = key("tool_mask").as_bool().unwrap();
    let mask: Vec<bool> = tool.iter().map(|m| !masked || *m != 0.0).collect();
    let window = Normalizer::Window {
        num_items_in_batch: mask.iter().filter(|m| **m).count(),
        steps_per_generation: number("steps_per_generation").unwrap() as usize,
    };
    let epsilon_high = number("epsilon_high").unwrap() as f32;
    let clip = Term::Clip {
        epsilon: number("epsilon").unwrap() as f32,
        epsilon_high,
        delta: number("delta").map_or(f32::INFINITY, |d| d as f32),
    };
    let (term, normalizer) = match loss_type {
        "grpo" => (clip, Normalizer::Sequence),
        "bnpo" => (clip, Normalizer::Token),
        "dr_grpo" => (clip, Normalizer::Constant { max_completion_length: 16 }),
        "dapo" => (clip, window),
        "luspo" => (clip, Normalizer::Sum),
        "cispo" => (Term::Cispo { epsilon_high }, window),
        "sapo" => {
            (Term::Sapo { temperature_pos: 1.0, temperature_neg: 1.05 }, Normalizer::Sequence)
        }
        "vespo" => {
            (Term::Vespo { k_pos: 2.0, lambda_pos: 3.0, k_neg: 3.0, lambda_neg: 2.0 }, window)
        }
        other => panic!("{other}"),
    };
    let beta = number("beta").unwrap() as f32;
    let config = PolicyLoss {
        term,
        level: if level == "token" { ImportanceLevel::Token } else { ImportanceLevel::Sequence },
        beta,
        bias_correction_kl: key("bias").as_bool().unwrap(),
    };
    let weights =
        token_weights(normalizer, lengths, &mask, number("accumulation").unwrap() as usize);
    let weights: Vec<f64> = weights.into_iter().map(f64::from).collect();
    let old = key("old").as_str().map(|name| floats(&f[name.to_lowercase()]));
    let ratio = key("is_ratio").as_str().map(|level| match level {
        "token" => floats(&f["is_token"]),
        _ => spread(&floats(&f["is_sequence"]), lengths),
    });
    // the sampler's correction multiplies the term, but is part of vespo's own weight
    let (mut scale, mut log_is) = (ratio, None);
    if loss_type == "vespo" && scale.is_some() {
        log_is = Some(match key("is_ratio") == "token" {
            true => {
                sums(&floats(&f["is_token"]).iter().map(|r| r.ln()).collect::<Vec<_>>(), lengths)
            }
            false => floats(&f["is_sequence"]).iter().map(|r| r.ln()).collect(),
        });
        scale = None;
    }
    let single = |v: &[f64]| -> Vec<f32> { v.iter().map(|v| *v as f32).collect() };
    if let Some(want) = case.get("scale") {
        let own = match number("off_policy") {
            Some(t) => off_policy_mask(
                lengths,
                &mask,
                &single(old.as_ref().unwrap()),
                &single(&logp),
                &sequences,
                t,
            ),
            None => top_entropy_mask(&singles(&f["entropy"]), &mask, number("quantile").unwrap()),
        };
        assert_eq!(own, singles(want), "{}", case["config"]);
        scale = Some(floats(want));
    }
    let mut bench = Bench::new();
    let put = |v: &Option<Vec<f64>>| v.as_ref().map(|v| bench.put(v));
    let (old, scale, log_is) = (put(&old), put(&scale), put(&log_is));
    let reference = (beta != 0.0).then(|| bench.put(&floats(&f["ref"])));
    let (advantage, weight) = (bench.put(&spread(&sequences, lengths)), bench.put(&weights));
    let starts = bench.starts(lengths);
    let mut out = None;
    let (loss, gradient) = bench.gradient(&logp, |cx, logp| {
        let x = PolicyInputs {
            logp,
            old_logp: old.as_ref(),
            advantage: &advantage,
            weight: &weight,
            ref_logp: reference.as_ref(),
            scale: scale.as_ref(),
            log_is: log_is.as_ref(),
            starts: &starts,
        };
        let made = policy_loss(cx, &config, &x).unwrap();
        let loss = made.loss.clone();
        out = Some(made);
        loss
    });
    check_metrics(case, &out.unwrap(), &mask, lengths, config.level);
    let want = case["loss"].as_f64().unwrap();
    let scale =
        weights.iter().zip(spread(&sequences, lengths)).map(|(w, a)| (w * a).abs()).sum::<f64>();
    // relative to the loss, or where its terms cancel to what they are sums of
    let loss_error = (loss - want).abs() / want.abs().max(1e-2 * scale);
    loss_error.max(distance(&gradient, &floats(&case["gradient"])))
}

fn sums(values: &[f64], lengths: &[usize]) -> Vec<f64> {
    let mut rest = values;
    let mut sum = |n: &usize| {
        let (own, more) = rest.split_at(*n);
        rest = more;
        own.iter().sum()
    };
    lengths.iter().map(&mut sum).collect()
}

fn check_metrics(
    case: &Value,
    out: &PolicyOut,
    mask: &[bool],
    lengths: &[usize],
    level: ImportanceLevel,
) {
    let starts: Vec<usize> =
        lengths.iter().scan(0, |at, n| Some(std::mem::replace(at, *at + n))).collect();
    // TRL's means: over tokens, or over sequences where the value is the sequence's
    let mean = |values: &[f64], by_sequence: bool| -> f64 {
        let picked: Vec<f64> = match by_sequence {
            true => starts.iter().map(|s| values[*s]).collect(),
            false => values.iter().zip(mask).filter(|(_, m)| **m).map(|(v, _)| *v).collect(),
        };
        picked.iter().sum::<f64>() / picked.len() as f64
    };
    let clip = host(&out.clip);
    let side = |s: f64| clip.iter().map(|c| f64::from(u8::from(*c == s))).collect::<Vec<_>>();
    for (name, want) in case["metrics"].as_object().unwrap() {
        let sequence = level != ImportanceLevel::Token;
        let got = match name.as_str() {
            "kl" => mean(&host(&out.kl), false),
            "clip_ratio/low_mean" => mean(&side(1.0), sequence),
            "clip_ratio/high_mean" | "cispo_clip_ratio" => mean(&side(2.0), sequence),
            "vespo/phi_seq_mean" => mean(&host(&out.ratio), true),
            _ => continue,
        };
        let want = want.as_f64().unwrap();
        assert!(
            (got - want).abs() <= 1e-5 * want.abs().max(1e-2),
            "{name} {got} {want}: {}",
            case["config"]
        );
    }
}

#[test]
fn rloos_loss_and_gradient_are_trls() {
    let f = json(fixture("policy.json"));
    let lengths = lengths(&f);
    let mut bench = Bench::new();
    let mask = vec![true; lengths.iter().sum()];
    let weights = token_weights(Normalizer::Sequence, &lengths, &mask, 1);
    let weight = bench.put(&weights.into_iter().map(f64::from).collect::<Vec<_>>());
    let (old, advantage) =
        (bench.put(&floats(&f["near"])), bench.put(&spread(&floats(&f["advantage"]), &lengths)));
    let starts = bench.starts(&lengths);
    let term = Term::Clip { epsilon: 0.2, epsilon_high: 0.2, delta: f32::INFINITY };
    let config = PolicyLoss {
        term,
        level: ImportanceLevel::SequenceSum,
        beta: 0.0,
        bias_correction_kl: false,
    };
    let (loss, gradient) = bench.gradient(&floats(&f["logp"]), |cx, logp| {
        let x = PolicyInputs {
            logp,
            old_logp: Some(&old),
            advantage: &advantage,
            weight: &weight,
            ref_logp: None,
            scale: None,
            log_is: None,
            starts: &starts,
        };
        policy_loss(cx, &config, &x).unwrap().loss
    });
    let want = f["rloo"]["loss"].as_f64().unwrap();
    assert!((loss - want).abs() < 1e-5 * want.abs(), "{loss} {want}");
    let error = distance(&gradient, &floats(&f["rloo"]["gradient"]));
    assert!(error < 1e-5, "{error}");
}

fn scores(f: &Value) -> Scores {
    Scores {
        names: vec!["a".into(), "b".into()],
        weights: floats(&f["reward_weights"]),
        each: f["rewards"].as_array().unwrap().iter().map(optional).collect(),
    }
}

fn check_advantages(case: &Value, got: &Advantages) {
    let error = distance(&got.advantages, &floats(&case["advantages"]));
    // TRL's are f32; where a group's rewards are equal its mean rounds and the quotient by 1e-4
    // shows it
    assert!(error < 1e-5, "{error} {}", case["config"]);
    let zero = got.zero_std.iter().filter(|z| **z).count() as f64 / got.zero_std.len() as f64;
    assert_eq!(
        zero,
        case["metrics"]["frac_reward_zero_std"].as_f64().unwrap(),
        "{}",
        case["config"]
    );
}

#[test]
fn grpo_and_rloo_advantages_are_trls_with_missing_rewards() {
    let f = json(fixture("policy.json"));
    let (scores, g) = (scores(&f), f["num_generations"].as_u64().unwrap() as usize);
    let cases = f["advantages"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let scale = match case["config"]["scale_rewards"].as_str().unwrap() {
            "group" => ScaleRewards::Group,
            "batch" => ScaleRewards::Batch,
            _ => ScaleRewards::None,
        };
        let how = match case["config"]["multi_objective_aggregation"].as_str().unwrap() {
            "normalize_then_sum" => RewardAggregation::NormalizeThenSum,
            _ => RewardAggregation::SumThenNormalize,
        };
        check_advantages(case, &advantage::grpo(&scores, g, scale, how).unwrap());
        let metrics = &case["metrics"];
        for (name, rewards) in
            [("reward", scores.total()), ("rewards/a/mean", scores.each[0].clone())]
        {
            let (mean, std) = advantage::mean_std(&rewards);
            assert!((mean - metrics[name].as_f64().unwrap()).abs() < 1e-6, "{name}");
            let std_name = if name == "reward" { "reward_std" } else { "rewards/a/std" };
            assert!((std - metrics[std_name].as_f64().unwrap()).abs() < 1e-6, "{std_name}");
        }
    }
    let kl = floats(&f["rloo_kl"]);
    for case in f["rloo_advantages"].as_array().unwrap() {
        let config = &case["config"];
        let clip = config["reward_clip_range"]
            .as_array()
            .map(|c| (c[0].as_f64().unwrap(), c[1].as_f64().unwrap()));
        let beta = config.get("beta").and_then(Value::as_f64).unwrap_or(0.0);
        let rewards = advantage::rloo_rewards(&scores.total(), clip, beta, &kl);
        let normalize = config["normalize_advantages"].as_bool().unwrap();
        check_advantages(case, &advantage::rloo(&rewards, g, normalize).unwrap());
    }
    let error =
        advantage::grpo(&scores, 3, ScaleRewards::Group, RewardAggregation::SumThenNormalize)
            .unwrap_err()
            .to_string();
    assert!(error.contains("num_generations=3"), "{error}");
}

#[test]
fn reinforce_plus_plus_whitens_over_tokens() {
    let f = json(fixture("policy.json"));
    for case in f["reinforce_plus_plus"].as_array().unwrap() {
        let group = case["group"].as_u64().map(|g| g as usize);
        let got = advantage::reinforce_plus_plus(&optional(&case["rewards"]), &lengths(&f), group)
            .unwrap();
        assert!(distance(&got, &floats(&case["advantages"])) < 1e-12);
    }
}

#[test]
fn ppos_gae_whitening_and_clip_losses_are_the_published_formulas() {
    let f = json(fixture("policy.json"));
    let (p, lengths) = (&f["ppo"], lengths(&f));
    let mut bench = Bench::new();
    let starts = bench.starts(&lengths);
    let at = |name: &str| floats(&p[name]);
    let (reward, value, mask) =
        (bench.put(&at("reward")), bench.put(&at("value")), bench.put(&at("mask")));
    let (gamma, lam) = (p["gamma"].as_f64().unwrap() as f32, p["lam"].as_f64().unwrap() as f32);
    let (advantages, returns) = gae(&mut bench.cx, &reward, &value, &starts, gamma, lam).unwrap();
    let white = whiten(&mut bench.cx, &advantages, &mask, true).unwrap();
    let unshifted = whiten(&mut bench.cx, &reward, &mask, false).unwrap();
    let close = |name: &str, got: &[f64], want: &[f64]| {
        let error = distance(got, want);
        assert!(error < 1e-6, "{name}: {error:.2e}");
    };
    close("advantage", &host(&advantages), &at("advantage"));
    close("returns", &host(&returns), &at("returns"));
    close("whitened", &host(&white), &at("whitened"));
    close("whitened_unshifted", &host(&unshifted), &at("whitened_unshifted"));
    let kept: Vec<bool> = at("mask").iter().map(|m| *m != 0.0).collect();
    let weights: Vec<f64> =
        token_weights(Normalizer::Token, &lengths, &kept, 1).into_iter().map(f64::from).collect();
    let (weight, old) = (bench.put(&weights), bench.put(&floats(&f["old"])));
    let term = Term::Clip { epsilon: 0.2, epsilon_high: 0.2, delta: f32::INFINITY };
    let config =
        PolicyLoss { term, level: ImportanceLevel::Token, beta: 0.0, bias_correction_kl: false };
    let mut clipped = Vec::new();
    let (loss, gradient) = bench.gradient(&floats(&f["logp"]), |cx, logp| {
        let x = PolicyInputs {
            logp,
            old_logp: Some(&old),
            advantage: &white,
            weight: &weight,
            ref_logp: None,
            scale: None,
            log_is: None,
            starts: &starts,
        };
        let out = policy_loss(cx, &config, &x).unwrap();
        clipped = host(&out.clip);
        out.loss
    });
    let tokens = kept.iter().filter(|k| **k).count() as f64;
    let fraction = |clip: &[f64]| {
        clip.iter().zip(&kept).filter(|(c, k)| **c != 0.0 && **k).count() as f64 / tokens
    };
    // whitened advantages sum to nothing: the error of their sum is relative to the size of its
    // terms
    let size: f64 = weights.iter().zip(at("whitened")).map(|(w, a)| (w * a).abs()).sum();
    close("policy_loss", &[loss, size], &[p["policy_loss"].as_f64().unwrap(), size]);
    close("policy_gradient", &gradient, &at("policy_gradient"));
    close("policy_clipfrac", &[fraction(&clipped)], &[p["policy_clipfrac"].as_f64().unwrap()]);
    let (loss, gradient) = bench.gradient(&at("new_value"), |cx, new| {
        let (loss, clip) = value_loss(cx, new, &value, &returns, &weight, 0.2).unwrap();
        clipped = host(&clip);
        loss
    });
    close("value_loss", &[loss], &[p["value_loss"].as_f64().unwrap()]);
    close("value_gradient", &gradient, &at("value_gradient"));
    close("value_clipfrac", &[fraction(&clipped)], &[p["value_clipfrac"].as_f64().unwrap()]);
}

#[test]
fn token_rewards_carry_the_penalty_and_the_score() {
    let advantage::TokenRewards { rewards, kl } =
        advantage::token_rewards(&[-1.0, -2.0], &[-1.5, -2.0], 3.0, 0.1, KlEstimator::K1);
    assert_eq!((rewards, kl), (vec![-0.05, 3.0], vec![0.5, 0.0]));
    let kl = advantage::token_rewards(&[-1.0], &[-1.5], 0.0, 0.1, KlEstimator::K3).kl;
    assert!((f64::from(kl[0]) - ((-0.5f64).exp() + 0.5 - 1.0)).abs() < 1e-7);
    let mut coef = advantage::AdaptiveKl { coef: 0.1, target: 6.0, horizon: 100.0 };
    coef.update(60.0, 10);
    assert!((coef.coef - 0.102).abs() < 1e-12);
}

#[test]
fn a_kl_term_without_a_reference_is_an_error() {
    let mut bench = Bench::new();
    let (x, starts) = (bench.put(&[0.0]), bench.starts(&[1]));
    let term = Term::Cispo { epsilon_high: 5.0 };
    let config =
        PolicyLoss { term, level: ImportanceLevel::Token, beta: 0.1, bias_correction_kl: true };
    let inputs = PolicyInputs {
        logp: &x,
        old_logp: None,
        advantage: &x,
        weight: &x,
        ref_logp: None,
        scale: None,
        log_is: None,
        starts: &starts,
    };
    assert!(
        policy_loss(&mut bench.cx, &config, &inputs)
            .is_err_and(|e| e.to_string().contains("ref_logp"))
    );
}
