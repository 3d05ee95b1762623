//! Criterion over the op registry: the forward of every performance case on the CPU device, f32.
//! `cargo bench -- rmsnorm` runs one op. The times are for comparing two builds on one machine.

use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use temper::check::prepare_case;
use temper::device::{DType, Device, cpu::Cpu};
use temper::ops::case::{PerfShape, Rng};
use temper::ops::registry::registry;

/// A small model, so that all ops take seconds.
const SHAPE: PerfShape = PerfShape {
    sequences: 4,
    length: 64,
    hidden: 128,
    intermediate: 384,
    heads: 4,
    kv_heads: 2,
    head_dim: 32,
    vocab: 512,
};

fn ops(c: &mut Criterion) {
    let device: Arc<dyn Device> = Arc::new(Cpu::new());
    for entry in registry() {
        let mut group = c.benchmark_group(entry.name);
        group.sample_size(10);
        let mut rng = Rng(0x7e57);
        for case in (entry.perf)(&mut rng, &SHAPE) {
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
