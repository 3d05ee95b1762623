//! Criterion over the op registry: every case's forward on the CPU device, f32.
//! `cargo bench -- rmsnorm` runs one op. Figures are for comparing two builds on one machine.

use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use temper::check::prepare_case;
use temper::device::{DType, Device, cpu::Cpu};
use temper::ops::case::Rng;
use temper::ops::registry::registry;

fn ops(c: &mut Criterion) {
    let device: Arc<dyn Device> = Arc::new(Cpu::new());
    for entry in registry() {
        let mut group = c.benchmark_group(entry.name);
        group.sample_size(10);
        let mut rng = Rng(0x7e57);
        for case in (entry.cases)(&mut rng) {
            let variant = &entry.variants[0];
            let (mut cx, inputs) = match prepare_case(&device, &case, DType::F32, variant) {
                Ok(ready) => ready,
                Err(e) => panic!("{} {}: {e}", entry.name, case.label),
            };
            let inputs: Vec<_> = inputs.iter().collect();
            group.bench_function(case.label.as_str(), |b| {
                b.iter(|| cx.apply_dyn(case.op.clone(), &inputs).map(|_| ()))
            });
        }
        group.finish();
    }
}

criterion_group!(benches, ops);
criterion_main!(benches);
