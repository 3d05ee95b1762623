//! Generation against transformers 5.17, and the commands that generate.

use std::sync::Arc;

use serde_json::Value;
use temper::rollout::sample::Sampling;
use temper::rollout::stop::StopStrings;
use temper::rollout::{Engine, EngineOptions, Finish, Request, generate};

use crate::support::{
    MODEL, cpu, decoder, fixture, golden, json, json_lines, temper, temper_reading, tokenizer,
};

fn lists(value: &Value) -> Vec<Vec<u32>> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn greedy_tokens_are_those_of_transformers_for_every_family() {
    let cases: Value = json(fixture("generate.json"));
    let cases = cases.as_object().unwrap();
    assert_eq!(cases.len(), std::fs::read_dir(fixture("models")).unwrap().count());
    for (case, want) in cases {
        let mut cx = cpu();
        let mut model = decoder(&cx, golden(case), 16);
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
    let mut cx = cpu();
    let mut model = decoder(&cx, MODEL, 16);
    let tokenizer = Arc::new(tokenizer());
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
    let fixed =
        ["generate", "--model", MODEL, "--device", "cpu", "--data", paths[0], "--output", paths[1]];
    let run = |keys: &[&str]| {
        let (code, _, err) = temper(&[&fixed[..], keys].concat());
        assert_eq!(code, Some(0), "{err}");
        json_lines(&out)
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
    let (code, _, err) = temper(&[&fixed[..], &["repetition_penalty=0"]].concat());
    assert!(code == Some(2) && err.contains("repetition_penalty"), "{err}");
}

#[test]
fn a_chat_keeps_its_history_until_it_is_reset() {
    let chat = |input: &str| {
        let args =
            ["chat", "--model", MODEL, "--device", "cpu", "max_new_tokens=8", "temperature=0"];
        let (code, out, err) = temper_reading(&args, input);
        assert_eq!(code, Some(0), "{err}");
        out
    };
    let one = chat("hello\n");
    assert!(one.ends_with('\n') && one.trim().len() > 1, "{one:?}");
    assert_eq!(chat("hello\n/quit\nhello\n"), one);
    assert_eq!(chat("hello\n/reset\nhello\n"), format!("{one}{one}"));
    assert_ne!(chat("hello\nhello\n"), format!("{one}{one}"), "the second reply sees the first");
}
