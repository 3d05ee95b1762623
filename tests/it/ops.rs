//! Every case of every registered op on the CPU device, fast and strict.

use std::sync::Arc;

use temper::check::{CaseRun, check_ops, prepare_case, run_case};
use temper::device::{DType, Device, cpu::Cpu};
use temper::ops::case::{DEFAULT, PerfShape, Rng, Variant};
use temper::ops::registry::registry;
use temper::tensor::Tensor;

fn all_pass(device: Arc<dyn Device>) {
    let outcomes = check_ops(&device, "", |_| {});
    let failures: Vec<String> = outcomes
        .iter()
        .filter_map(|o| {
            o.failure
                .as_ref()
                .map(|f| format!("{} {} {} {}: {f}", o.op, o.variant, o.dtype.name(), o.case))
        })
        .collect();
    assert!(outcomes.len() > 20, "the registry is not empty");
    assert!(
        failures.is_empty(),
        "{} of {} cases fail:\n{}",
        failures.len(),
        outcomes.len(),
        failures.join("\n")
    );
}

#[test]
fn every_op_case_passes_on_the_cpu() {
    all_pass(Arc::new(Cpu::new()));
}

#[test]
fn every_op_case_passes_on_the_strict_cpu() {
    all_pass(Arc::new(Cpu::strict(1)));
}

/// Where the machine has no AVX-512 the two devices are the same.
#[test]
fn wider_vectors_change_no_bit() {
    let devices: [Arc<dyn Device>; 2] = [Arc::new(Cpu::narrow()), Arc::new(Cpu::new())];
    let mut compared = 0;
    for entry in registry() {
        let fits = |v: &&Variant| v.runs_on(&*devices[0]) && v.dtypes.contains(&DType::F32);
        for variant in entry.variants.iter().filter(fits) {
            for case in (entry.cases)(&mut Rng(4)) {
                let run = |device| run_case(device, &case, DType::F32, variant, 5).unwrap();
                let [narrow, wide] = devices.each_ref().map(run);
                assert_eq!(bits(&narrow), bits(&wide), "{} {}", entry.name, case.label);
                compared += 1;
            }
        }
    }
    assert!(compared > 100, "{compared} cases");
}

/// Of all outputs and gradients.
fn bits(run: &CaseRun) -> Vec<u64> {
    let values = run.outputs.iter().chain(run.gradients.iter().flatten()).flatten();
    values.map(|x| x.to_bits()).collect()
}

#[test]
fn every_op_has_a_performance_case_that_runs_and_has_a_cost() {
    let device: Arc<dyn Device> = Arc::new(Cpu::new());
    let shape = PerfShape {
        sequences: 2,
        length: 9,
        hidden: 32,
        intermediate: 48,
        heads: 2,
        kv_heads: 1,
        head_dim: 16,
        vocab: 70,
    };
    for entry in registry() {
        let cases = (entry.perf)(&mut Rng(1), &shape);
        assert!(!cases.is_empty(), "{} has no performance case", entry.name);
        for case in cases {
            let (mut cx, inputs) = prepare_case(&device, &case, DType::F32, &DEFAULT).unwrap();
            let inputs: Vec<&Tensor> = inputs.iter().collect();
            let outputs = cx.apply_dyn(case.op.clone(), &inputs).unwrap();
            // What is written in place, in part, is an input too.
            let fresh = |o: &&Tensor| inputs.iter().all(|x| x.address() != o.address());
            let written = outputs.iter().filter(fresh).map(Tensor::bytes).max().unwrap_or(1) as f64;
            let cost = case.op.cost(&inputs);
            // The largest output is written at least once.
            assert!(cost.bytes >= written && cost.bytes.is_finite(), "{}: {cost:?}", entry.name);
            assert!(cost.flops >= 0.0 && cost.flops.is_finite(), "{}: {cost:?}", entry.name);
        }
    }
}

#[test]
fn the_self_check_of_a_whole_model_passes_on_the_cpu() {
    let device: Arc<dyn Device> = Arc::new(Cpu::new());
    let outcomes = temper::check::model::check_model(&device, |_| {});
    let failures: Vec<String> = outcomes
        .iter()
        .filter_map(|o| {
            o.failure.as_ref().map(|f| format!("{} {} {}: {f}", o.op, o.dtype.name(), o.case))
        })
        .collect();
    assert_eq!(outcomes.len(), 8);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
