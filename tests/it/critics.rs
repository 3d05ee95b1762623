//! PPO's value model: its gradients, its initialisation, and runs with each kind.

use std::path::Path;

use serde_json::{Value, json};
use temper::Training;
use temper::autograd::{Cx, Tape};
use temper::config::{PeftConfig, TrainingConfig};
use temper::device::DType;
use temper::methods::online::ppo::critic::Critic;
use temper::methods::online::ppo::{PpoConfig, ValueModel};
use temper::model::adapter::config::{AdapterConfig, AdapterKind, Targets};
use temper::model::adapter::{Adapter, PREFIX};
use temper::model::batch::{Batch, Sequence};
use temper::model::builder::InitialWeights;
use temper::model::decoder::Decoder;
use temper::model::layout::ModelConfig;
use temper::model::specs::Role;
use temper::observer::Silent;
use temper::ops::case::Rng;
use temper::ops::quant::Scheme;
use temper::tensor::{ParamSetId, Tensor};

use crate::support::{MODEL, cpu, metrics, words, write_rows};

const LORA: &str = "use_peft=true lora_target_modules=all-linear lora_dropout=0 lora_r=4";
const COMMON: &str = "per_device_train_batch_size=4 gradient_accumulation_steps=2 logging_steps=1 \
                      max_completion_length=12 device=cpu reward_funcs=regex:^[a-z]";

fn prompts(dir: &Path) -> String {
    let row = |i: usize| json!({ "prompt": format!("Ana had 21 stones and lost {i}.\n") });
    write_rows(dir.join("prompts.jsonl"), &(1..17).map(row).collect::<Vec<_>>())
}

fn ppo(dir: &Path, out: &Path, keys: &str, resume: bool) -> temper::Result<Vec<Value>> {
    let run = Training::new("ppo")?.options(words(&format!("{COMMON} {keys}"))).model(MODEL);
    run.data([prompts(dir)]).output(out).observer(Silent).resume(resume).run()?;
    Ok(metrics(out))
}

#[test]
fn ppo_of_every_kind_of_critic_resumes_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    for (name, keys) in [
        ("lora", format!("{LORA} value_model=lora")),
        ("dora", format!("{LORA} use_dora=true value_model=lora value_lora_r=2")),
        ("qlora", format!("{LORA} load_in_4bit=true value_model=lora optim=adamw_8bit")),
        ("qlora own", format!("{LORA} load_in_8bit=true value_model=own")),
        ("lora shared", format!("{LORA} value_model=shared")),
        ("ia3", "use_peft=true peft_type=ia3 value_model=lora value_lora_r=3".into()),
    ] {
        // A generation serves two steps, so step 3 is in the middle of one.
        let keys = format!("{keys} num_ppo_epochs=2 max_steps=6 save_steps=3 learning_rate=1e-2");
        let (whole, part) = (dir.path().join(name), dir.path().join(format!("{name} resumed")));
        let log = ppo(dir.path(), &whole, &keys, false).unwrap();
        assert_eq!(log.len(), 6, "{name}");
        std::fs::create_dir_all(part.join("checkpoint-3")).unwrap();
        for file in ["config.toml", "metrics.jsonl", "completions.jsonl"] {
            std::fs::copy(whole.join(file), part.join(file)).unwrap();
        }
        for file in std::fs::read_dir(whole.join("checkpoint-3")).unwrap() {
            let file = file.unwrap();
            let to = part.join("checkpoint-3").join(file.file_name());
            std::fs::copy(file.path(), to).unwrap();
        }
        let again = ppo(dir.path(), &part, &keys, true).unwrap();
        for file in ["adapter_model.safetensors", "completions.jsonl"] {
            let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
            assert!(read(&whole) == read(&part), "{name}: {file} differs after a resume");
        }
        for field in ["loss/value_avg", "val/grad_norm", "val/clipfrac_avg"] {
            let of = |log: &[Value]| log.iter().map(|l| l[field].clone()).collect::<Vec<_>>();
            assert_eq!(of(&again), of(&log), "{name}: {field}");
        }
        // The sampler's log-probs are the trainer's in the first pass over a generation.
        for i in [0, 2, 4] {
            let of = |field: &str| log[i][field].as_f64().unwrap();
            assert!(of("val/grad_norm") > 0.0, "{name}");
            assert!(of("objective/kl").is_finite(), "{name}");
        }
        assert_eq!(log[0]["objective/kl"].as_f64(), Some(0.0), "{name}: the reference is the base");
    }
}

#[test]
fn a_lora_critic_learns_its_returns() {
    let dir = tempfile::tempdir().unwrap();
    let keys = format!(
        "{LORA} value_model=lora num_ppo_epochs=2 kl_coef=0.01 max_steps=80 save_strategy=no \
         learning_rate=1e-2 temperature=1"
    );
    let log = ppo(dir.path(), &dir.path().join("out"), &keys, false).unwrap();
    let mean = |lines: &[Value], field: &str| {
        let values: Vec<f64> = lines.iter().filter_map(|l| l[field].as_f64()).collect();
        values.iter().sum::<f64>() / values.len() as f64
    };
    let value = |lines: &[Value]| mean(lines, "loss/value_avg");
    let (first, last) = (value(&log[..4]), value(&log[70..]));
    println!("value loss {first:.4} -> {last:.4}");
    assert!(last < 0.5 * first, "{first} -> {last}");
    let reward = |lines: &[Value]| mean(lines, "reward");
    let (first, last) = (reward(&log[..6]), reward(&log[68..]));
    println!("reward {first:.3} -> {last:.3}");
    assert!(last > first, "{first} -> {last}");
}

#[test]
fn a_lora_critic_needs_a_base_that_stays() {
    let dir = tempfile::tempdir().unwrap();
    for (keys, said) in [
        ("value_model=lora", "set use_peft=true"),
        (
            "use_peft=true peft_type=prompt_tuning value_model=lora",
            "this method does not support prompt tuning",
        ),
        ("value_lora_r=0 value_model=lora use_peft=true", "at least 1"),
    ] {
        let out = dir.path().join("refused");
        let error = ppo(dir.path(), &out, &format!("{keys} max_steps=1"), false).err().unwrap();
        assert!(error.to_string().contains(said), "{keys}: {error}");
        let _ = std::fs::remove_dir_all(&out);
    }
}

/// A small model with a LoRA adapter as a policy has it.
fn policy(cx: &Cx, scheme: Option<Scheme>) -> Decoder {
    let config = ModelConfig::llama(61, 64, 128, 2, 4, 2, 64, true);
    let weights = InitialWeights::Random { seed: 3 };
    let base = Decoder::builder(config).weights(weights).storage(scheme).positions(64);
    let base = base.build(cx).unwrap();
    let keys = PeftConfig {
        use_peft: true,
        lora_r: 4,
        lora_alpha: 6.0,
        lora_target_modules: Some(vec!["all-linear".into()]),
        ..Default::default()
    };
    let config = AdapterConfig::from_keys(&keys, &base.config, "base").unwrap();
    let adapter = Adapter::new(cx, config, &base.config, &base.params, 5).unwrap();
    base.with_adapter(Some(adapter)).unwrap()
}

fn critic(cx: &mut Cx, policy: &Decoder, value_model: ValueModel) -> Critic {
    let options = PpoConfig { value_model, ..Default::default() };
    Critic::new(cx, policy, policy, &options, 40, &TrainingConfig::default()).unwrap()
}

fn batch(cx: &Cx, policy: &Decoder) -> Batch {
    let rows = [(0..23).collect::<Vec<u32>>(), (5..40).rev().collect()];
    let sequences: Vec<Sequence> = rows.iter().map(|ids| Sequence { ids, target: None }).collect();
    Batch::new(cx, &sequences, policy.vocab()).unwrap()
}

/// Values, and the gradients of sum_i upstream[i] v[i] by parameter.
fn gradients(
    cx: &mut Cx,
    critic: &Critic,
    policy: &Decoder,
    batch: &Batch,
    upstream: &[f32],
) -> (Vec<f32>, Vec<Vec<f32>>) {
    critic.reset(cx).unwrap();
    cx.tape = Some(Tape::default());
    let values = critic.values(cx, policy, batch, None).unwrap();
    let dv = Tensor::from_f32(&cx.pool, "dv", DType::F32, &[upstream.len()], upstream).unwrap();
    cx.backward(vec![(values.clone(), dv)]).unwrap();
    let params = critic.params();
    cx.param_grads[params.set].finish().unwrap();
    let view = |i| params.state_view(&critic.optimizer.grad, i).unwrap().unwrap();
    let grads = (0..params.specs.len()).map(|i| view(i).to_f32().unwrap()).collect();
    (values.to_f32().unwrap(), grads)
}

fn gauss(rng: &mut Rng, n: usize, scale: f64) -> Vec<f32> {
    (0..n).map(|_| (scale * rng.normal()) as f32).collect()
}

/// |a - b| / |b|
fn off(a: &[f64], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let apart = square(&mut a.iter().zip(b).map(|(a, b)| a - f64::from(*b)));
    apart / square(&mut b.iter().map(|b| f64::from(*b)))
}

/// W' = W + s B A has dA = s B^T dW' and dB = s dW' A^T, with dW' the gradient of a critic whose own
/// weights are W'. And a small step along the gradient changes the loss by the gradient's square.
#[test]
fn gradients_of_a_lora_critic_are_those_of_its_merged_weights() {
    let mut cx = cpu();
    let policy = policy(&cx, None);
    let before = [&policy.params, policy.trained()].map(|p| p.weights.to_vec::<u32>().unwrap());
    let low = critic(&mut cx, &policy, ValueModel::Lora);
    let (set, mut rng) = (low.params(), Rng(7));
    assert_eq!(set.set, ParamSetId::Value);
    for (i, spec) in set.specs.iter().enumerate() {
        let scale = if spec.role == Role::Score { 1.0 } else { 0.2 };
        set.store(i, &gauss(&mut rng, spec.len(), scale)).unwrap();
    }
    let batch = batch(&cx, &policy);
    let upstream = gauss(&mut rng, batch.target_ids.len(), 1.0);
    let start: Vec<Vec<f32>> =
        (0..set.specs.len()).map(|i| set.weight_view(i).unwrap().to_f32().unwrap()).collect();
    let (low_values, low_grads) = gradients(&mut cx, &low, &policy, &batch, &upstream);

    let loss = |values: &[f32]| {
        values.iter().zip(&upstream).map(|(v, u)| f64::from(*v) * f64::from(*u)).sum::<f64>()
    };
    let square: f64 = low_grads.iter().flatten().map(|g| f64::from(*g).powi(2)).sum();
    let step = 1e-3 / square.sqrt();
    let mut along = |sign: f64| {
        for (i, (w, g)) in start.iter().zip(&low_grads).enumerate() {
            let moved = w.iter().zip(g).map(|(w, g)| *w + (sign * step * f64::from(*g)) as f32);
            set.store(i, &moved.collect::<Vec<_>>()).unwrap();
        }
        loss(&low.values(&mut cx, &policy, &batch, None).unwrap().to_f32().unwrap())
    };
    let slope = (along(1.0) - along(-1.0)) / (2.0 * step * square);
    // A difference of f32 sums over a step of 1e-3.
    assert!((slope - 1.0).abs() < 2e-2, "{slope}");

    low.measure(&mut cx, 1e-3, 1).unwrap();
    low.apply(&cx).unwrap();
    let after = [&policy.params, policy.trained()].map(|p| p.weights.to_vec::<u32>().unwrap());
    assert!(before == after, "the policy is not the critic's to change");

    // One set of gradients a context: the other critic comes when this one is done.
    let whole = critic(&mut cx, &policy, ValueModel::Own);
    let value_of = |name: &str| {
        let i = set.by_name(&format!("{PREFIX}{name}")).unwrap();
        (i, start[i].clone())
    };
    // r, and s = alpha / r.
    let (r, s) = (4, 1.5f64);
    let dense = whole.params();
    for (i, spec) in dense.specs.iter().enumerate() {
        let module = spec.name.trim_end_matches(".weight");
        let mut w = dense.weight_view(i).unwrap().to_f32().unwrap();
        if spec.name.contains("_proj") {
            let (_, a) = value_of(&format!("{module}.lora_A.weight"));
            let (_, b) = value_of(&format!("{module}.lora_B.weight"));
            let k = spec.shape[1];
            for (at, w) in w.iter_mut().enumerate() {
                let (n, c) = (at / k, at % k);
                let dot =
                    (0..r).map(|j| f64::from(b[n * r + j]) * f64::from(a[j * k + c])).sum::<f64>();
                *w = (f64::from(*w) + s * dot) as f32;
            }
        } else if spec.role == Role::Score {
            w = value_of("score.weight").1;
        }
        dense.store(i, &w).unwrap();
    }
    let (values, grads) = gradients(&mut cx, &whole, &policy, &batch, &upstream);
    let mut worst = off(&values.iter().map(|v| f64::from(*v)).collect::<Vec<_>>(), &low_values);
    let mut compared = 0;
    for (spec, dw) in dense.specs.iter().zip(&grads) {
        let module = spec.name.trim_end_matches(".weight");
        if spec.role == Role::Score {
            let (at, _) = value_of("score.weight");
            let dw: Vec<f64> = dw.iter().map(|v| f64::from(*v)).collect();
            worst = worst.max(off(&dw, &low_grads[at]));
            compared += 1;
        }
        if !spec.name.contains("_proj") {
            continue;
        }
        let (at_a, a) = value_of(&format!("{module}.lora_A.weight"));
        let (at_b, b) = value_of(&format!("{module}.lora_B.weight"));
        let (rows, k) = (spec.shape[0], spec.shape[1]);
        let (mut da, mut db) = (vec![0f64; r * k], vec![0f64; rows * r]);
        for (at, dw) in dw.iter().enumerate() {
            let (n, c, dw) = (at / k, at % k, s * f64::from(*dw));
            for j in 0..r {
                da[j * k + c] += dw * f64::from(b[n * r + j]);
                db[n * r + j] += dw * f64::from(a[j * k + c]);
            }
        }
        worst = worst.max(off(&da, &low_grads[at_a])).max(off(&db, &low_grads[at_b]));
        compared += 2;
    }
    assert_eq!(compared, set.specs.len(), "every parameter of the critic");
    // Sums of f32 in another order.
    assert!(worst < 2e-5, "{worst:e}");
}

#[test]
fn a_critic_of_its_own_starts_as_a_quantised_policys_base() {
    for scheme in [Scheme::Nf4 { double: true }, Scheme::Int8] {
        let mut cx = cpu();
        let policy = policy(&cx, Some(scheme));
        let batch = batch(&cx, &policy);
        let base = policy.clone().with_adapter(None).unwrap().hidden(&mut cx, &batch).unwrap();
        for kind in [ValueModel::Own, ValueModel::Lora] {
            let critic = critic(&mut cx, &policy, kind);
            let trunk = critic.trunk().unwrap();
            let own = trunk.hidden(&mut cx, &batch).unwrap();
            let bits = |t: &Tensor| t.to_vec::<u32>().unwrap();
            assert!(bits(&own) == bits(&base), "{scheme:?} {kind:?}");
            let values = critic.values(&mut cx, &policy, &batch, None).unwrap().to_f32().unwrap();
            assert!(values.iter().all(|v| *v == 0.0), "the score is zero");
        }
    }
}

#[test]
fn a_lora_critic_has_the_policys_shape_unless_its_options_say_otherwise() {
    let mut cx = cpu();
    let policy = policy(&cx, None);
    let mut kind = |options: PpoConfig, policy: &Decoder| {
        let options = PpoConfig { value_model: ValueModel::Lora, ..options };
        let critic = Critic::new(&mut cx, policy, policy, &options, 8, &TrainingConfig::default());
        critic.map(|critic| {
            let trunk = critic.trunk().unwrap();
            match &trunk.adapter.as_ref().unwrap().config.kind {
                AdapterKind::Lora(c) => (c.r, c.alpha, c.dropout, c.targets.clone()),
                _ => panic!("a LoRA"),
            }
        })
    };
    let plain = kind(PpoConfig::default(), &policy).unwrap();
    assert_eq!(plain, (4, 6.0, 0.0, Targets::AllLinear));
    let own = PpoConfig {
        value_lora_r: Some(2),
        value_lora_alpha: Some(3.0),
        value_lora_target_modules: Some(vec!["v_proj".into()]),
        ..Default::default()
    };
    let names = Targets::Names(vec!["v_proj".into()]);
    assert_eq!(kind(own, &policy).unwrap(), (2, 3.0, 0.0, names));
    let whole = policy.clone().with_adapter(None).unwrap();
    let error = kind(PpoConfig::default(), &whole).err().unwrap().to_string();
    assert!(error.contains("set use_peft=true"), "{error}");
}
