//! Direct preference optimisation with typed options, and an observer that keeps the metrics.
//!
//! `cargo run --example dpo` takes a few seconds.

use std::sync::{Arc, Mutex};

use temper::config::Amount;
use temper::methods::offline::dpo::DpoConfig;
use temper::observer::MetricValue;
use temper::{MethodRun, Observer, Result, Training};

/// The loss at every logged step. All else that the run says is dropped.
#[derive(Clone, Default)]
struct Losses(Arc<Mutex<Vec<(u64, f64)>>>);

impl Observer for Losses {
    fn metrics(&self, step: u64, _total: u64, metrics: &[(&str, MetricValue)]) {
        for (name, value) in metrics {
            if let (&"loss", MetricValue::Float(loss), Ok(mut all)) = (name, value, self.0.lock()) {
                all.push((step, *loss));
            }
        }
    }
}

fn main() -> Result<()> {
    let mut run = MethodRun::<DpoConfig>::default();
    run.method.beta = 0.2;
    run.training.learning_rate = 1e-3;
    run.training.max_steps = 4;
    run.training.logging_steps = Amount::Count(1);
    let losses = Losses::default();
    Training::with(run)?
        .model("tests/fixtures/sft/model")
        .data(["tests/fixtures/preferences/plain.jsonl"])
        .output(std::env::temp_dir().join("temper-example-dpo"))
        .overwrite(true)
        .observer(losses.clone())
        .run()?;
    for (step, loss) in losses.0.lock().unwrap_or_else(|e| e.into_inner()).iter() {
        println!("step {step}: loss {loss:.4}");
    }
    Ok(())
}
