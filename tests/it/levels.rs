//! The levels of `kernels/levels/`: against the f64 oracle in both modes of the CPU, and against
//! each other.

use std::process::Command;
use std::sync::Arc;

use temper::check::{check_ops, run_case};
use temper::device::{DType, Device, cpu::Cpu};
use temper::ops::case::{Case, DEFAULT, Rng};
use temper::ops::levels::LEVELS;

use crate::support::{done, finish};

fn all_pass(device: Cpu) {
    let device: Arc<dyn Device> = Arc::new(device);
    let outcomes = check_ops(&device, "level", |_| {});
    for level in LEVELS {
        let mine = outcomes.iter().filter(|o| o.op == level.name).count();
        assert!(mine >= 2 * level.variant[0].dtypes.len(), "{} has {mine} cases", level.name);
    }
    let failed: Vec<String> = outcomes
        .iter()
        .filter_map(|o| {
            o.failure.as_ref().map(|f| format!("{} {} {}: {f}", o.op, o.dtype.name(), o.case))
        })
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn every_level_passes_on_the_cpu() {
    all_pass(Cpu::new());
}

#[test]
fn every_level_passes_on_the_strict_cpu() {
    all_pass(Cpu::strict(1));
}

/// The outputs of all cases of a level, as bits.
fn bits(device: Cpu, cases: &[Case], dtype: DType) -> Vec<Vec<u64>> {
    let device: Arc<dyn Device> = Arc::new(device);
    let run = |case: &Case| {
        let run = run_case(&device, case, dtype, &DEFAULT, 1);
        run.unwrap_or_else(|e| panic!("{} {}: {e}", case.op.name(), case.label))
    };
    cases
        .iter()
        .flat_map(|case| run(case).outputs)
        .map(|o| o.iter().map(|v| v.to_bits()).collect())
        .collect()
}

#[test]
fn fast_and_strict_mode_give_the_same_bits_for_every_level() {
    for level in LEVELS {
        let cases = (level.cases)(&mut Rng(3));
        for &dtype in level.variant[0].dtypes {
            let fast = bits(Cpu::new(), &cases, dtype);
            let strict = bits(Cpu::strict(2), &cases, dtype);
            assert!(fast == strict, "{} {}", level.name, dtype.name());
        }
    }
}

/// The levels whose headers promise the bits of the first of them.
const SAME_BITS: [&[&str]; 3] = [
    &["level_matmul_1", "level_matmul_2", "level_matmul_3", "level_matmul_4", "level_matmul_5"],
    &["level_matmul_6", "level_matmul_7", "level_matmul_8"],
    &["level_attention_4", "level_attention_5", "level_attention_6"],
];

#[test]
fn levels_have_the_same_bits_where_their_heads_say_so() {
    for names in SAME_BITS {
        let of = |name: &str| {
            let level = LEVELS.iter().find(|level| level.name == name).unwrap();
            bits(Cpu::new(), &(level.cases)(&mut Rng(3)), DType::BF16)
        };
        let first = of(names[0]);
        for name in &names[1..] {
            assert!(of(name) == first, "{name} differs from {}", names[0]);
        }
    }
}

#[test]
fn a_level_refuses_what_is_not_whole_tiles() {
    let device: Arc<dyn Device> = Arc::new(Cpu::new());
    for level in LEVELS {
        let mut case = (level.cases)(&mut Rng(3)).remove(0);
        for arg in &mut case.inputs {
            let (rows, cols) = (arg.value.row_count().min(100), arg.value.cols());
            arg.value.data.truncate(rows * cols);
            arg.value.shape = vec![rows, cols];
        }
        let dtype = level.variant[0].dtypes[0];
        let error = run_case(&device, &case, dtype, &DEFAULT, 1).err().expect(level.name);
        assert!(error.to_string().contains("without gaps"), "{error}");
    }
}

#[test]
fn every_level_has_a_file_and_its_number_in_the_list() {
    for (path, count) in [("matmul", 8), ("attention", 6)] {
        for n in 1..=count {
            let name = format!("level_{path}_{n}");
            let level = LEVELS.iter().find(|level| level.name == name).expect(&name);
            assert_eq!((level.cases)(&mut Rng(3))[0].op.name(), name);
            let text = std::fs::read_to_string(format!("kernels/{}.cu", level.kernel)).unwrap();
            assert!(text.contains(&format!("level {n}")), "{name}: its head names its level");
            assert!(text.contains("// Changes"), "{name}: its head says what it changes");
        }
    }
    assert_eq!(LEVELS.len(), 14);
}

#[test]
fn on_a_cpu_the_bench_shows_correctness_and_no_time() {
    let out = done(&["bench", "levels", "--device", "cpu"]);
    for level in LEVELS {
        let line = out.lines().find(|line| line.starts_with(level.name)).expect(level.name);
        let words: Vec<&str> = line.split_whitespace().collect();
        assert!(words[1].parse::<usize>().unwrap() >= 2, "{line}");
        assert!(line.ends_with(level.idea), "{line}");
    }
    assert!(out.contains("say nothing about a GPU"), "{out}");
    assert!(out.contains("temper bench levels --device cuda"), "{out}");
    assert!(!out.contains("TFLOP/s"), "{out}");
}

#[test]
fn the_program_for_gdb_runs_each_level_that_it_takes() {
    let dir = tempfile::tempdir().unwrap();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    for level in 1..=6 {
        let program = dir.path().join(format!("step{level}"));
        let mut compile = Command::new(&compiler);
        compile.args("-g -O0 -std=c++17 -w -I kernels".split(' ')).arg(format!("-DLEVEL={level}"));
        compile.args(["kernels/levels/step.cpp", "kernels/shim/shim.cpp", "-o"]).arg(&program);
        let (code, text) = finish(&mut compile);
        assert_eq!(code, Some(0), "{text}");
        let (code, text) = finish(&mut Command::new(&program));
        assert_eq!(code, Some(0), "{text}");
        assert_eq!(text, format!("level {level}: 0 of 32768 values are wrong\n"));
    }
}
