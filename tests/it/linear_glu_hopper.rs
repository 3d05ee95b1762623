//! A gated unit in the product before it, and its backward in the product behind it
//! (`kernels/linear_glu_hopper.cu`), on the CPU twins of Hopper: the bits of separate ops.

use std::sync::Arc;

use temper::autograd::{Cx, ParamGrads, Recompute, Tape};
use temper::check::check_ops;
use temper::check::gated::compare;
use temper::config::{AttentionChoice, MatmulChoice};
use temper::device::cpu::Cpu;
use temper::device::dry_run::DryRun;
use temper::device::{Capabilities, DType, Device, MemoryInfo};
use temper::methods::Method;
use temper::methods::offline::sft::{Sft, SftRun};
use temper::ops::activation::{Act, glu};
use temper::ops::case::Rng;
use temper::ops::linear_glu::linear_glu;
use temper::ops::matmul::linear;
use temper::ops::mlp::{DenseLayer, mlp};
use temper::ops::rmsnorm::{Norm, NormWeight, rmsnorm};
use temper::tensor::{Id, ParamSetId, Tensor};
use temper::train::Trainer;

use crate::support::{self, decoder, golden, words};

const NORM: Norm = Norm { eps: 1e-6, weight: NormWeight::Rounded };
const ACTS: [Act; 3] = [Act::Silu, Act::GeluTanh, Act::Gelu];

fn context(device: impl Device + 'static) -> Cx {
    let mut cx = Cx::new(Arc::new(device), DType::BF16).unwrap();
    cx.matmul = MatmulChoice::Own;
    cx
}

fn random(cx: &Cx, seed: u64, shape: &[usize]) -> Tensor {
    let scale = if shape.len() == 2 { (shape[1] as f64).powf(-0.5) } else { 1.0 };
    let scale = if seed == 1 { 1.5 } else { scale };
    let values: Vec<f32> = Rng(seed).array(shape, scale).data.iter().map(|v| *v as f32).collect();
    Tensor::from_f32(&cx.pool, "t", DType::BF16, shape, &values).unwrap()
}

fn bits(t: &Tensor) -> Vec<u32> {
    t.to_f32().unwrap().iter().map(|v| v.to_bits()).collect()
}

/// Rows, columns of the gated unit, k: edges of tiles in each direction; the ring goes round; both
/// consumers have several tiles, and one has none.
const SHAPES: [[usize; 3]; 6] =
    [[65, 8, 8], [128, 64, 64], [130, 72, 200], [300, 200, 72], [70, 136, 520], [513, 40, 136]];

fn forward(device: Cpu, [m, f, k]: [usize; 3], bias: bool, act: Act) -> Vec<u32> {
    let mut cx = context(device);
    let (x, w) = (random(&cx, 1, &[m, k]), random(&cx, 2, &[2 * f, k]));
    let bias = bias.then(|| random(&cx, 3, &[2 * f]));
    bits(&linear_glu(&mut cx, &x, &w, bias.as_ref(), act).unwrap())
}

#[test]
fn the_fused_forward_has_the_bits_of_two_ops() {
    for shape in SHAPES {
        for (act, bias) in ACTS.into_iter().zip([false, true, true]) {
            let apart = forward(Cpu::new(), shape, bias, act);
            let fused = forward(Cpu::new().with_wgmma(), shape, bias, act);
            assert!(apart == fused, "{act:?} {shape:?}");
        }
    }
}

#[test]
fn strict_mode_gives_the_same_bits_and_finds_nothing() {
    for (i, shape) in SHAPES.into_iter().enumerate() {
        let act = ACTS[i % 3];
        let fast = forward(Cpu::new().with_wgmma(), shape, true, act);
        let strict = forward(Cpu::strict(i as u64).with_wgmma(), shape, true, act);
        assert!(fast == strict, "{act:?} {shape:?}");
    }
}

/// What a test of an MLP varies.
#[derive(Clone, Copy, Debug)]
struct Variation {
    /// Rows, columns of the gated unit, input, output.
    shape: [usize; 4],
    act: Act,
    biases: bool,
    /// Whether the weights are trained.
    trained: bool,
    recompute: Recompute,
}

/// The result of an MLP and all gradients, by one op or by three.
fn trained(device: Cpu, v: Variation, one_op: bool) -> Vec<Vec<u32>> {
    let [m, f, k, n] = v.shape;
    let mut cx = context(device);
    cx.recompute = v.recompute;
    let mut grads = Vec::new();
    let mut parameter = |cx: &Cx, seed: u64, shape: &[usize]| {
        let index = grads.len() as u32;
        let gradient = || Tensor::new(&cx.pool, "gradient", DType::F32, shape).unwrap();
        grads.push(v.trained.then(gradient));
        random(cx, seed, shape).with_id(Id::Param { set: ParamSetId::Model, index })
    };
    // What comes before it, so that its input is a value, with a gradient that is looked at.
    let (first, norm) = (parameter(&cx, 9, &[k, 16]), parameter(&cx, 10, &[k]));
    let (w, down) = (parameter(&cx, 2, &[2 * f, k]), parameter(&cx, 3, &[n, f]));
    let bias = v.biases.then(|| parameter(&cx, 4, &[2 * f]));
    let down_bias = v.biases.then(|| parameter(&cx, 5, &[n]));
    for (slot, shape) in [[k, 16].as_slice(), &[k]].into_iter().enumerate() {
        grads[slot] = Some(Tensor::new(&cx.pool, "gradient", DType::F32, shape).unwrap());
    }
    cx.param_grads[ParamSetId::Model] = ParamGrads::new(grads);
    cx.tape = Some(Tape::default());
    let input = random(&cx, 1, &[m, 16]);
    let x = linear(&mut cx, &input, &first, None).unwrap();
    let x = rmsnorm(&mut cx, &x, &norm, NORM).unwrap();
    if v.recompute == Recompute::Layers {
        cx.tape.as_mut().unwrap().begin_segment();
    }
    let before = cx.tape.as_ref().unwrap().len();
    let y = match one_op {
        true => {
            let gate_up = DenseLayer { weight: &w, bias: bias.as_ref() };
            let down = DenseLayer { weight: &down, bias: down_bias.as_ref() };
            mlp(&mut cx, &x, gate_up, down, v.act).unwrap()
        }
        false => {
            let gate_up = linear(&mut cx, &x, &w, bias.as_ref()).unwrap();
            let gated = glu(&mut cx, &gate_up, v.act).unwrap();
            linear(&mut cx, &gated, &down, down_bias.as_ref()).unwrap()
        }
    };
    assert_eq!(cx.tape.as_ref().unwrap().len() - before, if one_op { 1 } else { 3 });
    let mut all = vec![bits(&y)];
    let dy = random(&cx, 6, &[m, n]);
    cx.backward(vec![(y, dy)]).unwrap();
    let grads = &mut cx.param_grads[ParamSetId::Model];
    assert_eq!(grads.touched[2..].iter().any(|t| *t), v.trained);
    all.extend(grads.slots.iter().flatten().map(bits));
    all
}

const VARIATION: Variation = Variation {
    shape: [130, 72, 40, 24],
    act: Act::Silu,
    biases: true,
    trained: true,
    recompute: Recompute::Off,
};

#[test]
fn one_op_has_the_gradients_of_three_bit_for_bit() {
    for (i, shape) in
        [[3, 8, 8, 8], [130, 72, 40, 24], [300, 200, 72, 200], [70, 136, 16, 520], [513, 24, 8, 8]]
            .into_iter()
            .enumerate()
    {
        for recompute in [Recompute::Off, Recompute::Light, Recompute::Layers] {
            let v =
                Variation { shape, act: ACTS[i % 3], biases: i % 2 == 1, recompute, ..VARIATION };
            let apart = trained(Cpu::new().with_wgmma(), v, false);
            assert!(apart == trained(Cpu::new().with_wgmma(), v, true), "{v:?}");
        }
    }
}

#[test]
fn strict_mode_finds_nothing_in_the_backward_either() {
    for (seed, act) in ACTS.into_iter().enumerate() {
        for recompute in [Recompute::Off, Recompute::Light] {
            let shape = [[130, 72, 40, 24], [300, 200, 8, 136], [65, 136, 8, 328]][seed];
            let v = Variation { shape, act, recompute, ..VARIATION };
            let strict = || Cpu::strict(seed as u64).with_wgmma();
            assert!(
                trained(strict(), v, true) == trained(Cpu::new().with_wgmma(), v, true),
                "{v:?}"
            );
        }
    }
}

#[test]
fn frozen_weights_pass_the_gradient_on() {
    for recompute in [Recompute::Off, Recompute::Light, Recompute::Layers] {
        let v = Variation { trained: false, recompute, ..VARIATION };
        let device = || Cpu::new().with_wgmma();
        assert!(trained(device(), v, true) == trained(device(), v, false), "{v:?}");
    }
}

#[test]
fn every_case_of_both_ops_passes_with_the_kernels_of_hopper() {
    for device in [Cpu::new().with_wgmma(), Cpu::strict(1).with_wgmma()] {
        let device: Arc<dyn Device> = Arc::new(device);
        for op in ["linear_glu", "mlp"] {
            let outcomes = check_ops(&device, op, |_| {});
            assert!(outcomes.iter().any(|o| o.op == op && o.dtype == DType::BF16));
            let failed: Vec<String> = outcomes
                .iter()
                .filter_map(|o| o.failure.as_ref().map(|f| format!("{} {}: {f}", o.op, o.case)))
                .collect();
            assert!(failed.is_empty(), "{}", failed.join("\n"));
        }
    }
}

/// Losses and norms of gradients of three steps on a golden model.
fn steps(device: Cpu, model: &str, keys: &str) -> Vec<u32> {
    let mut cx = context(device);
    cx.attention = AttentionChoice::Simt;
    let keys = format!(
        "{keys} per_device_train_batch_size=2 max_steps=3 train_sampling_strategy=sequential \
         learning_rate=1e-3"
    );
    let (run, _) = SftRun::load(None, &words(&keys)).unwrap();
    let rows = support::rows("sft/text.jsonl");
    let model = decoder(&cx, golden(model), 240);
    let (mut sft, _) =
        support::with_inputs(&model.config, &rows, |i| Sft::new(&run.method, i).unwrap());
    let count = Method::rows(&sft);
    let mut trainer = Trainer::new(cx, model, run.training, count).unwrap();
    let mut all = Vec::new();
    for _ in 0..3 {
        let step = trainer.step(&mut sft).unwrap();
        all.extend([step.loss.to_bits(), step.grad_norm.to_bits()]);
    }
    all
}

#[test]
fn whole_steps_have_the_same_bits_with_and_without_the_fused_kernels() {
    for model in ["gemma2", "olmo2", "phi3"] {
        let apart = steps(Cpu::new(), model, "gradient_checkpointing=false");
        for recompute in ["false", "light", "true"] {
            let keys = format!("gradient_checkpointing={recompute}");
            let fused = steps(Cpu::new().with_wgmma(), model, &keys);
            assert_eq!(apart, fused, "{model}, {keys}");
        }
    }
}

/// The fused kernels that an MLP's forward and backward launch on a GPU that computes nothing.
fn launches(wgmma: bool, matmul: MatmulChoice, [k, f]: [usize; 2]) -> Vec<String> {
    let capabilities = Capabilities { wgmma, ..Capabilities::GPU };
    let device = Arc::new(DryRun::new("a GPU", capabilities, MemoryInfo { free: 0, total: 0 }));
    let mut cx = Cx::new(device.clone(), DType::BF16).unwrap();
    cx.matmul = matmul;
    let tensor = |shape: &[usize]| Tensor::new(&cx.pool, "t", DType::BF16, shape).unwrap();
    let (x, w, down) = (tensor(&[256, k]), tensor(&[2 * f, k]), tensor(&[k, f]));
    let dy = tensor(&[256, k]);
    let gradient = Tensor::new(&cx.pool, "gradient", DType::F32, &[256, k]).unwrap();
    cx.param_grads[ParamSetId::Model] = ParamGrads::new(vec![Some(gradient)]);
    let x = x.with_id(Id::Param { set: ParamSetId::Model, index: 0 });
    cx.tape = Some(Tape::default());
    let layer = |weight| DenseLayer { weight, bias: None };
    let y = mlp(&mut cx, &x, layer(&w), layer(&down), Act::Silu).unwrap();
    cx.backward(vec![(y, dy)]).unwrap();
    device.take_launches().into_keys().filter(|name| name.contains("glu")).collect()
}

#[test]
fn the_choice_depends_on_device_context_and_k() {
    use MatmulChoice::{Auto, Exact, Library, Own};
    let (forward, backward) = ("hopper_glu_nt_16_bf16", "hopper_glu_nn_0_bf16");
    let apart = ["glu_bwd_0_bf16", "glu_fwd_0_bf16"];
    for choice in [Auto, Exact, Own] {
        assert_eq!(launches(true, choice, [896, 4864]), [backward, forward], "{choice:?}");
        assert_eq!(launches(false, choice, [896, 4864]), apart, "{choice:?}");
    }
    assert_eq!(launches(true, Library, [896, 4864]), apart);
    // For a long k wide tiles are worth more.
    assert_eq!(launches(true, Own, [2048, 4864]), [apart[1], backward]);
    assert_eq!(launches(true, Own, [5120, 4864]), apart);
    // Rows of f values that do not begin at 16 bytes.
    assert_eq!(launches(true, Own, [896, 4860]), apart);
}

#[test]
fn the_self_check_of_a_gated_unit_passes_on_the_twins() {
    for recompute in [Recompute::Off, Recompute::Light] {
        let device: Arc<dyn Device> = Arc::new(Cpu::new().with_wgmma());
        let (case, differ) = compare(&device, [150, 40, 136], recompute).unwrap();
        assert!(differ.is_empty(), "{case}: {differ:?}");
        assert!(case.contains("; backward "), "{case}");
    }
}

/// The most memory that a training step of two MLPs on a GPU that computes nothing takes.
fn peak(recompute: Recompute, one_op: bool) -> usize {
    const SIZES: [usize; 3] = [2048, 896, 4864];
    let [m, k, f] = SIZES;
    let capabilities = Capabilities { wgmma: true, ..Capabilities::GPU };
    let mut cx = context(DryRun::new("a GPU", capabilities, MemoryInfo { free: 0, total: 0 }));
    cx.recompute = recompute;
    let shapes = [[2 * f, k], [k, f], [2 * f, k], [k, f]];
    let float = |shape: &[usize]| Tensor::new(&cx.pool, "gradient", DType::F32, shape).unwrap();
    let grads = shapes.iter().map(|s| Some(float(s)));
    let grads = ParamGrads::new(grads.chain([Some(float(&[k]))]).collect());
    cx.param_grads[ParamSetId::Model] = grads;
    let real = |shape: &[usize]| Tensor::new(&cx.pool, "t", DType::BF16, shape).unwrap();
    let id = |index| Id::Param { set: ParamSetId::Model, index };
    let w: Vec<Tensor> = (0..).zip(&shapes).map(|(i, s)| real(s).with_id(id(i))).collect();
    let norm = real(&[k]).with_id(id(4));
    let (mut x, dy) = (real(&[m, k]), real(&[m, k]));
    cx.tape = Some(Tape::default());
    for pair in w.chunks(2) {
        if recompute == Recompute::Layers {
            cx.tape.as_mut().unwrap().begin_segment();
        }
        let normed = rmsnorm(&mut cx, &x, &norm, NORM).unwrap();
        let layer = |weight| DenseLayer { weight, bias: None };
        x = match one_op {
            true => mlp(&mut cx, &normed, layer(&pair[0]), layer(&pair[1]), Act::Silu).unwrap(),
            false => {
                let gate_up = linear(&mut cx, &normed, &pair[0], None).unwrap();
                let gated = glu(&mut cx, &gate_up, Act::Silu).unwrap();
                drop(gate_up);
                linear(&mut cx, &gated, &pair[1], None).unwrap()
            }
        };
        if recompute == Recompute::Layers {
            cx.tape.as_mut().unwrap().end_segment();
        }
    }
    cx.backward(vec![(x, dy)]).unwrap();
    cx.pool.in_use().1
}

#[test]
fn one_op_takes_less_memory_than_three() {
    for recompute in [Recompute::Off, Recompute::Light, Recompute::Layers] {
        let (one, three) = (peak(recompute, true), peak(recompute, false));
        println!("{recompute:?}: {one} bytes, three ops {three}");
        assert!(one < three, "{recompute:?}: {one} bytes, three ops {three}");
    }
}
