//! Shared set-up of the tests: fixtures, the CPU device, small models and the binary.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use serde_json::Value;
use temper::autograd::Cx;
use temper::data::chat::ChatTemplate;
use temper::data::rows::{Row, read_rows};
use temper::data::tokenizer::Tokenizer;
use temper::device::{DType, cpu::Cpu};
use temper::methods::MethodInputs;
use temper::model::decoder::Decoder;
use temper::model::layout::ModelConfig;

/// A Llama of two layers with 320 tokens, a tokenizer and a chat template.
pub const MODEL: &str = "tests/fixtures/sft/model";

/// `cargo test` runs in the folder of the package, so a relative path finds the fixtures.
pub fn fixture(name: impl AsRef<Path>) -> PathBuf {
    Path::new("tests/fixtures").join(name)
}

/// A model folder that transformers wrote, with its log-probs.
pub fn golden(case: &str) -> PathBuf {
    fixture("models").join(case)
}

pub fn json(path: impl AsRef<Path>) -> Value {
    let path = path.as_ref();
    let text = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub fn json_lines(path: impl AsRef<Path>) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The metrics.jsonl of a run's folder.
pub fn metrics(out: &Path) -> Vec<Value> {
    json_lines(out.join("metrics.jsonl"))
}

/// Writes rows as .jsonl; returns the path as text, for a command line.
pub fn write_rows(path: impl AsRef<Path>, rows: &[Value]) -> String {
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(&path, lines).unwrap();
    path.as_ref().to_str().unwrap().to_string()
}

pub fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|word| word.to_string()).collect()
}

pub fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(String::from).collect()
}

pub fn floats(list: &Value) -> Vec<f64> {
    list.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

pub fn ids(list: &Value) -> Vec<u32> {
    list.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The CPU device in f32.
pub fn cpu() -> Cx {
    cpu_in(DType::F32)
}

pub fn cpu_in(dtype: DType) -> Cx {
    Cx::new(Arc::new(Cpu::new()), dtype).unwrap()
}

pub fn decoder(cx: &Cx, dir: impl AsRef<Path>, positions: usize) -> Decoder {
    Decoder::folder(dir.as_ref()).unwrap().positions(positions).build(cx).unwrap()
}

pub fn tokenizer() -> Tokenizer {
    Tokenizer::load(Path::new(MODEL)).unwrap()
}

pub fn tokenizer_and_template() -> (Tokenizer, ChatTemplate) {
    let tokenizer = tokenizer();
    let template = ChatTemplate::of(&tokenizer).unwrap();
    (tokenizer, template)
}

/// The rows of a fixture.
pub fn rows(name: &str) -> Vec<Row> {
    read_rows(&[fixture(name)]).unwrap()
}

/// Calls `build` with what a method is built from: the tokenizer of [`MODEL`], its template, and
/// rows to train on, none to evaluate.
pub fn with_inputs<T>(
    model: &ModelConfig,
    train: &[Row],
    build: impl FnOnce(&MethodInputs) -> T,
) -> T {
    let (tokenizer, template) = tokenizer_and_template();
    build(&MethodInputs {
        setup: &Default::default(),
        tokenizer: &tokenizer,
        template: Some(&template),
        model,
        train,
        eval: &[],
        on_bad_row: Default::default(),
        output: Path::new("unused"),
        rewards: &[],
        stored: None,
        feed: None,
    })
}

/// The binary, with nothing on its standard input.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_temper"));
    command.args(args).stdin(Stdio::null());
    command
}

/// Runs the binary with `input` on its standard input: exit code, standard output, standard error.
pub fn temper_reading(args: &[&str], input: &str) -> (Option<i32>, String, String) {
    let mut command = command(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    let text = |b: Vec<u8>| String::from_utf8(b).unwrap();
    (out.status.code(), text(out.stdout), text(out.stderr))
}

pub fn temper(args: &[&str]) -> (Option<i32>, String, String) {
    temper_reading(args, "")
}

/// The standard output of a command that must succeed.
pub fn done(args: &[&str]) -> String {
    let (code, out, err) = temper(args);
    assert_eq!(code, Some(0), "{args:?}: {err}");
    out
}

/// The exit code, and standard output and error in one text.
pub fn finish(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into_owned())
}
