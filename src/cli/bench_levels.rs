//! `temper bench levels`: the path to a fast kernel, level by level, beside the ceilings of the
//! device. Layer 9.
//!
//! Invariant: a level is checked before it is timed, and times are only given for a GPU.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::autograd::{Cost, Cx, Op};
use crate::check::{check_ops, prepare_case};
use crate::cli::bench_measure::{Ceilings, time, upload};
use crate::config::MatmulChoice;
use crate::device::{Device, Layout};
use crate::error::{Error, Result};
use crate::ops::case::{Case, DEFAULT, PerfShape, Rng};
use crate::ops::levels::{LEVELS, Level};
use crate::ops::matmul::product;
use crate::ops::registry::registry;
use crate::tensor::Tensor;

/// A product of 8192^3, and attention with 112 heads of 64 over 2048 positions.
const SHAPE: PerfShape = PerfShape {
    sequences: 8,
    length: 2048,
    hidden: 8192,
    intermediate: 8192,
    heads: 14,
    kv_heads: 14,
    head_dim: 64,
    vocab: 2,
};

const ON_A_CPU: &str = "The CPU runs these kernels through a shim, so its times say nothing \
                        about a GPU and only correctness is shown. To measure a GPU: temper \
                        bench levels --device cuda";

pub fn run(cx: &mut Cx, repeat: usize) -> Result<Value> {
    let timed = cx.device.capabilities().asynchronous; // a GPU
    let ceilings = timed.then(|| Ceilings::measure(cx, repeat)).transpose()?;
    let mut rows = Vec::new();
    for level in LEVELS {
        let mut row = checked(&cx.device, level)?;
        if let (Some(ceilings), true) = (&ceilings, row["cases"] != 0) {
            match level.variant[0].dtypes.contains(&cx.dtype) {
                true => add_time(&mut row, time_level(cx, level, repeat)?, ceilings),
                false => row["note"] = json!(format!("not in {}", cx.dtype.name())),
            }
        }
        rows.push(row);
    }
    if let Some(ceilings) = &ceilings {
        rows.extend(summits(cx, repeat, ceilings)?);
    }
    let mut result = json!({
        "bench": "levels", "device": cx.device.name(), "dtype": cx.dtype.name(), "levels": rows,
        "ceiling_matmul_tflops": ceilings.as_ref().map(|c| c.flops / 1e12),
        "ceiling_copy_gb_per_second": ceilings.as_ref().map(|c| c.bytes / 1e9),
    });
    if !timed {
        result["note"] = json!(ON_A_CPU);
    }
    Ok(result)
}

/// Checks the level's cases against the f64 oracle. No cases: the device lacks the instructions.
fn checked(device: &Arc<dyn Device>, level: &Level) -> Result<Value> {
    let outcomes = check_ops(device, level.name, |_| {});
    if let Some(o) = outcomes.iter().find(|o| o.failure.is_some()) {
        let what = o.failure.as_deref().unwrap_or("");
        let message = format!("{} {} {}: {what}", o.op, o.dtype.name(), o.case);
        return Err(Error::Run(format!("{message}; a wrong kernel is not timed")));
    }
    let mut row = json!({ "level": level.name, "idea": level.idea, "cases": outcomes.len() });
    if outcomes.is_empty() {
        row["note"] = json!("needs wgmma (compute capability 9.0)");
    }
    Ok(row)
}

/// Median seconds and cost of the level's performance case.
fn time_level(cx: &Cx, level: &Level, repeat: usize) -> Result<(f64, Cost)> {
    let case = first((level.perf)(&mut Rng(9), &SHAPE))?;
    time_case(cx, &case, repeat)
}

fn time_case(cx: &Cx, case: &Case, repeat: usize) -> Result<(f64, Cost)> {
    let (mut cx, inputs) = prepare_case(&cx.device, case, cx.dtype, &DEFAULT)?;
    let inputs: Vec<&Tensor> = inputs.iter().collect();
    let op: Arc<dyn Op> = case.op.clone();
    let seconds = time(&mut cx, repeat, |cx| cx.apply_dyn(op.clone(), &inputs).map(drop))?;
    Ok((seconds, case.op.cost(&inputs)))
}

fn first(cases: Vec<Case>) -> Result<Case> {
    let mut cases = cases.into_iter();
    cases.next().ok_or_else(|| Error::Run("a level without a performance case".into()))
}

fn add_time(row: &mut Value, (seconds, cost): (f64, Cost), ceilings: &Ceilings) {
    let flops = cost.flops / seconds;
    row["microseconds"] = json!(seconds * 1e6);
    row["tflops"] = json!(flops / 1e12);
    row["of_matmul"] = json!(flops / ceilings.flops);
}

/// The goals of the levels, with the same sizes: the library's product, the engine's own product
/// and the engine's attention.
fn summits(cx: &mut Cx, repeat: usize, ceilings: &Ceilings) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    let side = SHAPE.hidden;
    let mut rng = Rng(9);
    let (a, b) = (upload(cx, &mut rng, &[side, side])?, upload(cx, &mut rng, &[side, side])?);
    let c = cx.real("bench", &[side, side])?;
    let cost = Cost { flops: 2.0 * (side as f64).powi(3), bytes: 0.0 };
    let chosen = cx.matmul;
    for (choice, name) in
        [(MatmulChoice::Library, "library product"), (MatmulChoice::Own, "engine's product")]
    {
        cx.matmul = choice;
        let seconds = time(cx, repeat, |cx| product(cx, Layout::NN, &c, &a, &b, None, false))?;
        let mut row = json!({ "level": name, "idea": "the same product" });
        add_time(&mut row, (seconds, cost), ceilings);
        rows.push(row);
    }
    cx.matmul = chosen;
    for entry in registry().into_iter().filter(|entry| entry.name == "attention") {
        let case = first((entry.perf)(&mut Rng(9), &SHAPE))?;
        let mut row = json!({ "level": "engine's attention", "idea": "packed, the same lengths" });
        add_time(&mut row, time_case(cx, &case, repeat)?, ceilings);
        rows.push(row);
    }
    Ok(rows)
}

/// The result as a table.
pub fn table(result: &Value) -> String {
    let text = |v: &Value| v.as_str().unwrap_or("").to_string();
    let mut out = format!("device: {}, {}\n", text(&result["device"]), text(&result["dtype"]));
    let number = |v: &Value, digits: usize| v.as_f64().map(|v| format!("{v:.digits$}"));
    let ceiling = |name: &str| number(&result[name], 0);
    if let (Some(product), Some(copy)) =
        (ceiling("ceiling_matmul_tflops"), ceiling("ceiling_copy_gb_per_second"))
    {
        out += &format!("ceilings: library product {product} TFLOP/s, copy {copy} GB/s\n");
        out += "matrix product: 8192^3; attention: 112 heads of 64, causal, 2048 positions\n";
    }
    let line = |level: &str, cases: &str, [us, tflops, share]: [&str; 3], idea: &str| {
        format!("{level:<19} {cases:>6} {us:>12} {tflops:>8} {share:>11}  {idea}\n")
    };
    let timed = result["note"].is_null();
    let heads = if timed { ["microseconds", "TFLOP/s", "of ceiling"] } else { ["", "", ""] };
    out += &line("level", "passed", heads, "what it changes");
    for row in result["levels"].as_array().into_iter().flatten() {
        let cell = |name: &str, digits| number(&row[name], digits).unwrap_or_default();
        let idea = match row["note"].as_str() {
            Some(note) => format!("{} ({note})", text(&row["idea"])),
            None => text(&row["idea"]),
        };
        let times = [&*cell("microseconds", 1), &cell("tflops", 1), &cell("of_matmul", 3)];
        out += &line(&text(&row["level"]), &cell("cases", 0), times, &idea);
    }
    if let Some(note) = result["note"].as_str() {
        out += &format!("{note}\n");
    }
    out.truncate(out.trim_end().len());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A result as from a GPU of compute capability 8.0.
    #[test]
    fn the_table_has_times_where_there_are_some() {
        let ceilings = Ceilings { flops: 8e14, bytes: 2e12 };
        let mut row = json!({ "level": "level_matmul_6", "idea": "mma.sync", "cases": 3 });
        add_time(&mut row, (0.001, Cost { flops: 2e11, bytes: 0.0 }), &ceilings);
        let absent = json!({ "level": "level_matmul_7", "idea": "wgmma", "cases": 0, "note": "needs wgmma" });
        let result = json!({
            "device": "a GPU", "dtype": "bfloat16", "levels": [row, absent],
            "ceiling_matmul_tflops": 800.0, "ceiling_copy_gb_per_second": 2000.0,
        });
        let table = table(&result);
        let lines: Vec<Vec<&str>> = table.lines().map(|l| l.split_whitespace().collect()).collect();
        assert!(table.contains("library product 800 TFLOP/s, copy 2000 GB/s"), "{table}");
        assert_eq!(lines[4], ["level_matmul_6", "3", "1000.0", "200.0", "0.250", "mma.sync"]);
        assert_eq!(lines[5], ["level_matmul_7", "0", "wgmma", "(needs", "wgmma)"]);
    }
}
