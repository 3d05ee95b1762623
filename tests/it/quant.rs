//! Quantised weights and 8-bit moments against bitsandbytes' results for the same numbers
//! (`tests/fixtures/make_quant.py`).

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value;
use temper::autograd::Cx;
use temper::device::{DType, cpu::Cpu};
use temper::error::Error;
use temper::ops::adamw::{self, AdamW};
use temper::ops::quant::{NF4, QuantWeight, Scales, Scheme, dynamic_map};
use temper::optim::state::{MomentKind, Moments, Target};
use temper::tensor::Tensor;

use crate::support::{cpu, cpu_in, fixture, ids, json};

/// The twin of `source` in make_quant.py.
pub fn source(n: usize, seed: u32, scale: f64) -> Vec<f32> {
    let hash = |i: u32| {
        let mut h = i.wrapping_add(seed.wrapping_mul(0x9E37_79B9));
        h = (h ^ (h >> 16)).wrapping_mul(0x21F0_AAAD);
        h = (h ^ (h >> 15)).wrapping_mul(0x735A_2D97);
        (h ^ (h >> 15)) >> 12
    };
    let value = |i: usize| {
        let total: i64 = (0..3).map(|j| i64::from(hash(3 * i as u32 + j))).sum();
        (total - 3 * (1 << 19)) as f32 * 2f32.powi(-19) * scale as f32
    };
    (0..n).map(value).collect()
}

fn bits_of(t: &Tensor) -> Vec<u32> {
    t.to_vec::<f32>().unwrap().iter().map(|v| v.to_bits()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn same_codes(t: &Tensor, want: &Value, label: &str) {
    let got = t.to_vec::<u8>().unwrap();
    if let Some(text) = want["hex"].as_str() {
        assert_eq!(hex(&got), text, "{label}");
    }
    assert_eq!(u64::from(crc32fast::hash(&got)), want["crc"].as_u64().unwrap(), "{label}");
}

/// CRC of the dequantised bytes, by dtype.
fn dequantised(cx: &Cx, w: &QuantWeight, dtype: DType) -> u64 {
    let y = Tensor::new(&cx.pool, "y", dtype, &w.shape).unwrap();
    w.dequantise_into(cx, &y).unwrap();
    let bytes: Vec<u8> = match dtype {
        DType::BF16 => y
            .to_vec::<half::bf16>()
            .unwrap()
            .iter()
            .flat_map(|v| v.to_bits().to_le_bytes())
            .collect(),
        _ => y.to_vec::<f32>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect(),
    };
    u64::from(crc32fast::hash(&bytes))
}

#[test]
fn the_maps_are_bitsandbytes_bit_for_bit() {
    let f = json(fixture("quant.json"));
    let same = |ours: &[f32], name: &str| {
        let ours: Vec<u32> = ours.iter().map(|v| v.to_bits()).collect();
        assert_eq!(ours, ids(&f[name]), "{name}");
    };
    same(&NF4, "nf4");
    same(&dynamic_map(true), "signed");
    same(&dynamic_map(false), "unsigned");
}

#[test]
fn codes_scales_and_values_are_bitsandbytes_bit_for_bit() {
    for device in [Cpu::new(), Cpu::strict(1)] {
        let cx = Cx::new(Arc::new(device), DType::F32).unwrap();
        for case in json(fixture("quant.json"))["weights"].as_array().unwrap() {
            let shape: Vec<usize> = case["shape"]
                .as_array()
                .unwrap()
                .iter()
                .map(|v| v.as_u64().unwrap() as usize)
                .collect();
            let dtype = if case["dtype"] == "bfloat16" { DType::BF16 } else { DType::F32 };
            let values = source(
                shape[0] * shape[1],
                case["seed"].as_u64().unwrap() as u32,
                case["scale"].as_f64().unwrap(),
            );
            let x = Tensor::from_f32(&cx.pool, "x", dtype, &shape, &values).unwrap();
            let label = format!("{shape:?} {}", dtype.name());
            let values = |w: &QuantWeight, prefix: &str| {
                for to in [DType::F32, DType::BF16] {
                    let want = &case[format!("{prefix}_{}", to.name())];
                    assert_eq!(
                        dequantised(&cx, w, to),
                        want.as_u64().unwrap(),
                        "{label} {prefix} as {}",
                        to.name()
                    );
                }
            };
            let weight = |scheme| QuantWeight::from_tensor(&cx, &x, &[shape[0]], scheme).unwrap();

            let plain = weight(Scheme::Nf4 { double: false });
            same_codes(&plain.segments[0].codes, &case["codes"], &label);
            let Scales::Float(absmax) = &plain.segments[0].scales else {
                panic!("{label}: nested scales")
            };
            assert_eq!(bits_of(absmax), ids(&case["absmax"]), "{label}");
            values(&plain, "plain");

            let double = weight(Scheme::Nf4 { double: true });
            same_codes(&double.segments[0].codes, &case["codes"], &label);
            let Scales::Nested { codes, absmax, offset } = &double.segments[0].scales else {
                panic!("{label}: floats")
            };
            assert_eq!(
                bits_of(offset),
                [case["offset"].as_u64().unwrap() as u32],
                "{label}: offset"
            );
            same_codes(codes, &case["codes8"], &label);
            assert_eq!(bits_of(absmax), ids(&case["absmax2"]), "{label}");
            values(&double, "double");
            let stored = double.stored(0, "w", dtype).unwrap();
            let mut keys: Vec<&str> = stored.iter().skip(1).map(|s| &s.0[2..]).collect();
            keys.sort();
            assert_eq!(Value::from(keys), case["stored"], "{label}");
            let state: Value = serde_json::from_slice(&stored[stored.len() - 1].3).unwrap();
            assert_eq!(state, case["state"], "{label}");

            if case.get("int8").is_some() {
                let int8 = weight(Scheme::Int8);
                same_codes(&int8.segments[0].codes, &case["int8"], &label);
                let Scales::Float(absmax) = &int8.segments[0].scales else {
                    panic!("{label}: nested scales")
                };
                assert_eq!(bits_of(absmax), ids(&case["int8_absmax"]), "{label}");
                values(&int8, "int8");
            }
        }
    }
}

#[test]
fn segments_are_quantised_each_on_its_own_and_survive_storage() {
    let cx = cpu();
    let (rows, cols) = ([5, 3, 4], 27);
    let values = source(12 * cols, 9, 0.1);
    let x = Tensor::from_f32(&cx.pool, "x", DType::F32, &[12, cols], &values).unwrap();
    for double in [false, true] {
        let scheme = Scheme::Nf4 { double };
        let whole = QuantWeight::from_tensor(&cx, &x, &rows, scheme).unwrap();
        let mut files: HashMap<String, Vec<u8>> = HashMap::new();
        let mut from = 0;
        for (i, n) in rows.into_iter().enumerate() {
            let alone =
                QuantWeight::from_tensor(&cx, &x.rows(from, from + n).unwrap(), &[n], scheme)
                    .unwrap();
            from += n;
            let stored = alone.stored(0, &format!("w{i}"), DType::BF16).unwrap();
            assert_eq!(stored, whole.stored(i, &format!("w{i}"), DType::BF16).unwrap());
            files.extend(stored.into_iter().map(|s| (s.0, s.3)));
        }
        let find = |name: &str| {
            files.get(name).cloned().ok_or_else(|| Error::op("test", format!("no {name}")))
        };
        let read = QuantWeight::from_stored(&cx, &["w0", "w1", "w2"], find).unwrap();
        assert_eq!(read.shape, [12, cols]);
        for dtype in [DType::F32, DType::BF16] {
            assert_eq!(dequantised(&cx, &read, dtype), dequantised(&cx, &whole, dtype));
        }
        let error = QuantWeight::from_stored(&cx, &["w0", "w7"], find).unwrap_err().to_string();
        assert!(error.contains("w7"), "{error}");
    }
}

#[test]
fn a_double_quantised_weight_holds_about_four_bits_a_value() {
    let cx = cpu_in(DType::BF16);
    let n = 256 * 512;
    let x = Tensor::from_f32(&cx.pool, "x", DType::BF16, &[256, 512], &source(n, 3, 0.1)).unwrap();
    let w = QuantWeight::from_tensor(&cx, &x, &[256], Scheme::Nf4 { double: true }).unwrap();
    // n / 2 codes, n / 64 codes of scales, a float for each 256 of these, one offset, and the two
    // maps.
    assert_eq!(w.bytes(), n / 2 + n / 64 + n / 64 / 256 * 4 + 4 + 4 * (16 + 256));
}

#[test]
fn steps_of_8_bit_adamw_are_bitsandbytes() {
    let f = json(fixture("quant.json"));
    let f = &f["adamw"];
    let n = f["n"].as_u64().unwrap() as usize;
    let cx = cpu();
    let floats = |v: &[f32]| Tensor::from_f32(&cx.pool, "t", DType::F32, &[v.len()], v).unwrap();
    let (p, hyper) = (floats(&source(n, 100, 0.5)), adamw::hyper(&cx).unwrap());
    let moments = Moments::new(&cx, n, &[(0, n)], MomentKind::Blockwise8).unwrap();
    let lr = f["lr"].as_f64().unwrap();
    let group = AdamW {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: f["weight_decay"].as_f64().unwrap() as f32,
        lr_scale: 1.0,
        group: 0,
    };
    for (t, want) in f["steps"].as_array().unwrap().iter().enumerate() {
        let t = t as i32 + 1;
        let power = |beta: f32| 1.0 - f64::from(beta).powi(t);
        let scalars = [lr, power(0.9), power(0.999).sqrt(), 0.0, 1.0, 0.0, 0.0, 0.0];
        hyper.upload(&scalars.map(|v| v as f32)).unwrap();
        let grad = floats(&source(n, 100 + t as u32, 0.1));
        let target = Target { master: Some(&p), weight: &p, grad: &grad };
        moments.step(&cx, &group, (0, n), &target, &hyper).unwrap();
        for (name, tensor) in moments.named_tensors() {
            if name.ends_with("absmax") {
                // 1 - 0.999 is taken in float here and in double there: 1.3e-5 of v (its correction
                // has the same factor).
                for (a, b) in tensor.to_f32().unwrap().iter().zip(ids(&want[name])) {
                    assert!(
                        (a / f32::from_bits(b) - 1.0).abs() < 2e-5,
                        "step {t} {name}: {a} {}",
                        f32::from_bits(b)
                    );
                }
                continue;
            }
            let got = tensor.to_vec::<u8>().unwrap();
            let text = want[name].as_str().unwrap();
            let want: Vec<u8> =
                (0..n).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect();
            let differ = got.iter().zip(&want).filter(|(a, b)| a != b).count();
            // A value in the middle of two codes may fall to either side.
            let largest = got.iter().zip(&want).map(|(a, b)| a.abs_diff(*b)).max();
            assert!(
                differ <= 2 && largest <= Some(1),
                "step {t} {name}: {differ} codes differ, by up to {largest:?}"
            );
        }
    }
    for (a, b) in p.to_f32().unwrap().iter().zip(ids(&f["p"])) {
        assert!((a - f32::from_bits(b)).abs() < 1e-6, "{a} {}", f32::from_bits(b));
    }
}

/// Moments of two ranges, stepped; then again from what `named_tensors` gave after the first of two
/// steps.
#[test]
fn moments_of_every_kind_go_on_from_a_checkpoint_bit_for_bit() {
    let n = 700;
    let ranges = [(0, 300), (300, n)];
    for kind in [MomentKind::F32, MomentKind::Bf16, MomentKind::Blockwise8] {
        let mut cx = cpu_in(DType::BF16);
        let group = AdamW {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.1,
            lr_scale: 1.0,
            group: 0,
        };
        let hyper = adamw::hyper(&cx).unwrap();
        hyper.upload(&[1e-2f32, 0.1, 0.03, 0.0, 1.0, 0.0, 0.0, 0.0]).unwrap();
        let new = |cx: &Cx| Moments::new(cx, n, &ranges, kind).unwrap();
        let weights = |cx: &Cx| {
            Tensor::from_f32(&cx.pool, "w", DType::BF16, &[n], &source(n, 1, 0.5)).unwrap()
        };
        let step = |cx: &mut Cx, moments: &Moments, w: &Tensor, t: u32| {
            cx.set_rng(5, t, 0).unwrap();
            let grad =
                Tensor::from_f32(&cx.pool, "g", DType::F32, &[n], &source(n, 40 + t, 0.1)).unwrap();
            for (from, to) in ranges {
                let (weight, grad) = (w.rows(from, to).unwrap(), grad.rows(from, to).unwrap());
                let target = Target { master: None, weight: &weight, grad: &grad };
                moments.step(cx, &group, (from, to), &target, &hyper).unwrap();
            }
        };
        let (a, w) = (new(&cx), weights(&cx));
        step(&mut cx, &a, &w, 1);
        let saved = raw(&a);
        let kept = w.to_vec::<u16>().unwrap();
        assert_eq!(saved.iter().map(Vec::len).sum::<usize>(), a.bytes());
        step(&mut cx, &a, &w, 2);

        let (b, w2) = (new(&cx), weights(&cx));
        for ((_, t), bytes) in b.named_tensors().iter().zip(&saved) {
            t.upload(bytes).unwrap();
        }
        w2.upload(&kept).unwrap();
        step(&mut cx, &b, &w2, 2);
        assert_eq!(raw(&a), raw(&b), "{kind:?}");
        assert_eq!(w.to_vec::<u16>().unwrap(), w2.to_vec::<u16>().unwrap(), "{kind:?}");
        assert_ne!(raw(&a), saved, "{kind:?}: the second step changed nothing");
    }
}

fn raw(m: &Moments) -> Vec<Vec<u8>> {
    let bytes = |t: &Tensor| match t.dtype() {
        DType::U8 => t.to_vec::<u8>().unwrap(),
        DType::BF16 => t.to_vec::<u16>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect(),
        _ => t.to_vec::<f32>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect(),
    };
    m.named_tensors().iter().map(|(_, t)| bytes(t)).collect()
}

/// Rounded to nearest, v would stay where it is: each step moves it by a thousandth of itself.
#[test]
fn moments_in_bf16_follow_their_mean_by_chance() {
    let n = 4096;
    let mut cx = cpu();
    let moments = Moments::new(&cx, n, &[(0, n)], MomentKind::Bf16).unwrap();
    let group =
        AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, lr_scale: 1.0, group: 0 };
    let hyper = adamw::hyper(&cx).unwrap();
    let ones = Tensor::from_f32(&cx.pool, "g", DType::F32, &[n], &vec![1.0; n]).unwrap();
    let p = Tensor::from_f32(&cx.pool, "p", DType::F32, &[n], &vec![0.0; n]).unwrap();
    for t in 0..600 {
        cx.set_rng(1, t, 0).unwrap();
        moments
            .step(
                &cx,
                &group,
                (0, n),
                &Target { master: Some(&p), weight: &p, grad: &ones },
                &hyper,
            )
            .unwrap();
    }
    let Moments::Bf16 { v, .. } = &moments else { panic!() };
    let mean = v.to_f32().unwrap().iter().map(|v| f64::from(*v)).sum::<f64>() / n as f64;
    let exact = 1.0 - 0.999f64.powi(600);
    // The noise of one value is below 2^-8 of it a step, over some 600 steps; of 4096 means, below
    // 0.5%.
    assert!((mean / exact - 1.0).abs() < 5e-3, "{mean} {exact}");
}
