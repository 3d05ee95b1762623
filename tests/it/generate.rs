//! Generation against transformers 5.17, and the commands that generate.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use serde_json::Value;
use temper::autograd::Cx;
use temper::data::tokenizer::Tokenizer;
use temper::device::{DType, cpu::Cpu};
use temper::model::decoder::Decoder;
use temper::rollout::sample::Sampling;
use temper::rollout::stop::StopStrings;
use temper::rollout::{Engine, EngineOptions, Finish, Request, generate};

const SFT_MODEL: &str = "tests/fixtures/sft/model";

fn lists(value: &Value) -> Vec<Vec<u32>> {
    serde_json::from_value(value.clone()).unwrap()
}

fn load(cx: &Cx, dir: &Path) -> Decoder {
    Decoder::folder(dir).unwrap().positions(16).build(cx).unwrap()
}

#[test]
fn greedy_tokens_are_those_of_transformers_for_every_family() {
    let golden: Value =
        serde_json::from_slice(&std::fs::read("tests/fixtures/generate.json").unwrap()).unwrap();
    let golden = golden.as_object().unwrap();
    assert_eq!(golden.len(), std::fs::read_dir("tests/fixtures/models").unwrap().count());
    for (case, want) in golden {
        let mut cx = Cx::new(Arc::new(Cpu::new()), DType::F32).unwrap();
        let mut model = load(&cx, &Path::new("tests/fixtures/models").join(case));
        let options = EngineOptions::new(64, Sampling::greedy(), vec![], 4);
        let got =
            generate(&mut cx, &mut model, &lists(&want["prompts"]), &options, |_, _| {}).unwrap();
        for (got, want) in got.iter().zip(lists(&want["completions"])) {
            assert_eq!(want.len(), 64);
            assert_eq!(got.ids, want, "{case}");
            assert_eq!(got.finish, Finish::Length);
        }
    }
}

#[test]
fn a_completion_ends_with_the_token_that_completes_a_stop_string() {
    let mut cx = Cx::new(Arc::new(Cpu::new()), DType::F32).unwrap();
    let mut model = load(&cx, Path::new(SFT_MODEL));
    let tokenizer = Arc::new(Tokenizer::load(Path::new(SFT_MODEL)).unwrap());
    let prompt = tokenizer.encode("one two", true).unwrap();
    let sampling = Sampling { temperature: 1.0, seed: 1, ..Sampling::greedy() };
    let options = EngineOptions::new(40, sampling, vec![], 1);
    let request = [Request { prompt: prompt.clone(), n: 1, number: 0 }];
    let free = Engine::new(&cx, &mut model, options.clone(), 60)
        .unwrap()
        .generate(&mut cx, &model, &request)
        .unwrap();
    let text = tokenizer.decode(&free[0].ids, true).unwrap();
    // A text that begins inside one token and ends in another, somewhere in the middle.
    let chars: Vec<char> = text.chars().collect();
    let stop: String = chars[chars.len() / 2..chars.len() / 2 + 4].iter().collect();
    let strings = StopStrings::new(&[String::new(), stop.clone()], &tokenizer);
    assert!(strings.is_some() && StopStrings::new(&[String::new()], &tokenizer).is_none());
    let options = EngineOptions { stop_strings: strings, ..options };
    let ended = Engine::new(&cx, &mut model, options, 60)
        .unwrap()
        .generate(&mut cx, &model, &request)
        .unwrap();
    assert_eq!(ended[0].finish, Finish::Stop);
    let n = ended[0].ids.len();
    assert_eq!(ended[0].ids, free[0].ids[..n]);
    assert!(tokenizer.decode(&ended[0].ids, true).unwrap().contains(&stop), "{stop:?}");
    assert!(
        !tokenizer.decode(&ended[0].ids[..n - 1], true).unwrap().contains(&stop),
        "{stop:?} one token earlier"
    );
}

fn temper(args: &[&str], input: &str) -> (Option<i32>, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_temper"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    let text = |b: Vec<u8>| String::from_utf8(b).unwrap();
    (out.status.code(), text(out.stdout), text(out.stderr))
}

#[test]
fn generate_gives_n_completions_of_each_prompt_as_rows() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (dir.path().join("p.jsonl"), dir.path().join("c.jsonl"));
    std::fs::write(
        &data,
        "{\"prompt\": \"one\", \"id\": 7}\n{\"input_ids\": [5, 6, 7], \"id\": 8}\n",
    )
    .unwrap();
    let paths = [data.to_str().unwrap(), out.to_str().unwrap()];
    let fixed = [
        "generate", "--model", SFT_MODEL, "--device", "cpu", "--data", paths[0], "--output",
        paths[1],
    ];
    let run = |keys: &[&str]| {
        let (code, _, err) = temper(&[&fixed[..], keys].concat(), "");
        assert_eq!(code, Some(0), "{err}");
        let lines = std::fs::read_to_string(&out).unwrap();
        lines.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()).collect::<Vec<_>>()
    };
    let rows = run(&["n=3", "max_new_tokens=6", "repetition_penalty=1.2", "top_k=40", "seed=3"]);
    assert_eq!(
        rows.iter().map(|r| r["id"].as_i64().unwrap()).collect::<Vec<_>>(),
        [7, 7, 7, 8, 8, 8]
    );
    assert!(
        rows.iter().all(|r| r["logps"].as_array().unwrap().len()
            == r["completion_ids"].as_array().unwrap().len())
    );
    assert!(rows[0]["completion_ids"] != rows[1]["completion_ids"], "a group's completions differ");
    let again = run(&[
        "n=3",
        "max_new_tokens=6",
        "repetition_penalty=1.2",
        "top_k=40",
        "seed=3",
        "--step-tokens=2",
    ]);
    assert_eq!(rows, again);
    let (code, _, err) = temper(&[&fixed[..], &["repetition_penalty=0"]].concat(), "");
    assert!(code == Some(2) && err.contains("repetition_penalty"), "{err}");
}

#[test]
fn a_chat_keeps_its_history_until_it_is_reset() {
    let chat = |input: &str| {
        let args =
            ["chat", "--model", SFT_MODEL, "--device", "cpu", "max_new_tokens=8", "temperature=0"];
        let (code, out, err) = temper(&args, input);
        assert_eq!(code, Some(0), "{err}");
        out
    };
    let one = chat("hello\n");
    assert!(one.ends_with('\n') && one.trim().len() > 1, "{one:?}");
    assert_eq!(chat("hello\n/quit\nhello\n"), one);
    assert_eq!(chat("hello\n/reset\nhello\n"), format!("{one}{one}"));
    assert_ne!(chat("hello\nhello\n"), format!("{one}{one}"), "the second reply sees the first");
}
