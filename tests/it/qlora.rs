//! Quantised bases: against the losses of `tests/fixtures/peft/quantised.json` (bitsandbytes'
//! weights, PEFT, TRL), and against the same model with the dequantised weights held whole.

use std::path::Path;
use std::sync::Arc;

use temper::autograd::{Cx, F64, ParamGrads, Tape};
use temper::config::MatmulChoice;
use temper::device::DType;
use temper::methods::offline::sft::SftRun;
use temper::model::decoder::Decoder;
use temper::ops::case::Rng;
use temper::ops::lora::{Base, Pairs, Segment, lora_linear};
use temper::ops::quant::{QuantWeight, Scheme};
use temper::tensor::{Id, ParamSetId, Tensor};
use temper::train::tuning::{prepare, scheme};

use crate::peft::{flat, largest_difference, logps, trainer};
use crate::support::{MODEL, cpu, decoder, fixture, json};

#[test]
fn qlora_has_bitsandbytes_losses_and_no_dense_projection() {
    let all = json(fixture("peft/quantised.json"));
    let mut report = String::new();
    for (name, run) in all["runs"].as_object().unwrap() {
        let mut keys: Vec<String> = [
            "per_device_train_batch_size=4",
            "train_sampling_strategy=sequential",
            "max_steps=20",
            "use_peft=true",
        ]
        .map(String::from)
        .into();
        keys.push(format!("learning_rate={}", all["learning_rate"]));
        keys.extend(run["keys"].as_object().unwrap().iter().map(|(k, v)| format!("{k}={v}")));
        let (config, _) = SftRun::load(None, &keys).unwrap();
        let mut cx = cpu();
        let base = Decoder::folder(MODEL)
            .unwrap()
            .storage(scheme(&config.peft))
            .positions(512)
            .build(&cx)
            .unwrap();
        let (arena, count) = (base.params.len, base.params.count());
        let dense = decoder(&cx, MODEL, 512);
        assert_eq!(
            count,
            dense.params.count(),
            "{name}: parameters that are quantised are counted"
        );
        let projections: usize =
            dense.params.specs.iter().filter(|s| s.name.contains("proj")).map(|s| s.len()).sum();
        assert_eq!(
            arena + projections,
            dense.params.len,
            "{name}: no projection has a place in the arena"
        );
        drop(dense);
        let adapter = fixture("peft").join(run["adapter"].as_str().unwrap());
        let decoder =
            prepare(&cx, base, &config.peft, Some(&adapter), Path::new(MODEL), 42).unwrap();
        let start =
            largest_difference(&logps(&mut cx, &decoder, &all["ids"]), &flat(&run["start"]));
        let (mut trainer, mut sft) = trainer(cx, decoder, &config);
        let (mut loss, mut norm) = (0f64, 0f64);
        for i in 0..20 {
            let step = trainer.step(&mut sft).unwrap();
            let relative = |a: f64, field: &str| (a / run[field][i].as_f64().unwrap() - 1.0).abs();
            loss = loss.max(relative(f64::from(step.loss), "loss"));
            norm = norm.max(relative(f64::from(step.grad_norm), "grad_norm"));
        }
        report +=
            &format!("{name}: logps {start:.1e} at the start, loss {loss:.1e}, norm {norm:.1e}\n");
        // The same weights to the bit: what is left is the rounding of f32 products in log-probs of
        // about -10.
        assert!(start <= 2e-5 && loss <= 1e-5, "{report}");
    }
    println!("{report}");
}

/// y, and the gradients of x, A and all B, of one layer.
fn layer(own: bool, base: Option<Scheme>) -> Vec<Vec<f32>> {
    let mut cx = cpu();
    cx.matmul = if own { MatmulChoice::Own } else { MatmulChoice::Auto };
    let mut rng = Rng(3);
    let (m, k) = (37, 48);
    let put = |cx: &Cx, a: F64| {
        let values: Vec<f32> = a.data.iter().map(|v| *v as f32).collect();
        Tensor::from_f32(&cx.pool, "t", DType::F32, &a.shape, &values).unwrap()
    };
    let w = put(&cx, rng.array(&[40, k], 0.2));
    let q = Arc::new(
        QuantWeight::from_tensor(&cx, &w, &[24, 16], Scheme::Nf4 { double: true }).unwrap(),
    );
    q.dequantise_into(&cx, &w).unwrap();
    let shapes: [&[usize]; 4] = [&[m, k], &[7, k], &[24, 4], &[16, 3]];
    let mut params = Vec::new();
    let mut slots = Vec::new();
    for (index, shape) in shapes.iter().enumerate() {
        params.push(
            put(&cx, rng.array(shape, 0.5))
                .with_id(Id::Param { set: ParamSetId::Model, index: index as u32 }),
        );
        slots.push(Some(put(&cx, F64::zeros(shape))));
    }
    cx.param_grads[ParamSetId::Model] = ParamGrads::new(slots);
    let segment = |from, cols, rank_from, rank| Segment { from, cols, rank_from, rank, scale: 2.0 };
    let pairs = Pairs {
        a: params[1].clone(),
        b: vec![params[2].clone(), params[3].clone()],
        segments: vec![segment(0, 24, 0, 4), segment(24, 16, 4, 3)],
        scale: put(&cx, F64::from_fn(&[7], |_| 2.0)),
    };
    cx.tape = Some(Tape::default());
    let base = match base {
        Some(_) => Base::Quantised(&q),
        None => Base::Dense(&w),
    };
    let y = lora_linear(&mut cx, &params[0], None, base, None, &pairs).unwrap();
    let dy = put(&cx, rng.array(&[m, 40], 1.0));
    let mut out = vec![y.to_f32().unwrap()];
    cx.backward(vec![(y, dy)]).unwrap();
    out.extend(
        cx.param_grads[ParamSetId::Model]
            .slots
            .iter()
            .map(|s| s.as_ref().unwrap().to_f32().unwrap()),
    );
    out
}

#[test]
fn a_quantised_weight_has_the_bits_of_its_dequantised_values() {
    for own in [false, true] {
        let (dense, quantised) = (layer(own, None), layer(own, Some(Scheme::Nf4 { double: true })));
        assert!(dense == quantised, "own products: {own}");
    }
    // The two paths differ in the order of sums alone.
    for (a, b) in layer(false, None).iter().flatten().zip(layer(true, None).iter().flatten()) {
        assert!((a - b).abs() <= 1e-5 * (1.0 + a.abs()), "{a} {b}");
    }
}

#[test]
fn quantised_bases_that_make_no_sense_are_refused() {
    for (keys, said) in [
        (vec!["load_in_4bit=true"], "set use_peft=true"),
        (vec!["use_peft=true", "load_in_4bit=true", "load_in_8bit=true"], "set only one"),
    ] {
        let keys: Vec<String> = keys.iter().map(|k| k.to_string()).collect();
        let e = SftRun::load(None, &keys).unwrap_err().to_string();
        assert!(e.contains(said), "{keys:?}: {e}");
    }
}
