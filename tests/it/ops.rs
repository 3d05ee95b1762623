//! Every registered op case on the CPU device, fast and strict.

use std::sync::Arc;

use temper::check::check_ops;
use temper::device::{Device, cpu::Cpu};

fn all_pass(device: Arc<dyn Device>) {
    let outcomes = check_ops(&device, "", |_| {}).unwrap();
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

#[test]
fn the_self_check_of_a_whole_model_passes_on_the_cpu() {
    let device: Arc<dyn Device> = Arc::new(Cpu::new());
    let outcomes = temper::check::model::check_model(&device, |_| {}).unwrap();
    let failures: Vec<String> = outcomes
        .iter()
        .filter_map(|o| {
            o.failure.as_ref().map(|f| format!("{} {} {}: {f}", o.op, o.dtype.name(), o.case))
        })
        .collect();
    assert_eq!(outcomes.len(), 8);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
