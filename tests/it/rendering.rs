//! One rendering: a row's `tools` and `chat_template_kwargs`, the choice of the template and the
//! stop ids are the same in SFT, generation, evaluation, online RL and reward models.

use std::path::Path;

use serde_json::{Value, json};
use temper::data::chat::ChatTemplate;
use temper::data::render::Renderer;
use temper::data::rows::{Row, read_rows};
use temper::data::sft::{SftOptions, prepare};
use temper::data::tokenizer::Tokenizer;
use temper::model::decoder::Decoder;
use temper::model::layout::ModelConfig;
use temper::rewards::RewardBatch;
use temper::rewards::model::{RewardModel, sequence_scores};
use temper::rollout::stop::stop_ids;

use crate::support::{
    MODEL, cpu, done, json, json_lines, temper, tokenizer, tokenizer_and_template, write_rows,
};

const VOCAB: usize = 320;
/// Writes the tools and a keyword before the conversation.
const EXTRAS: &str = "{%- if tools %}{{ '<tools>' + tools[0].name }}{% endif %}\
                      {%- if mood is defined %}{{ '<mood>' + mood }}{% endif %}";

/// A copy of a model folder whose template writes [`EXTRAS`] first.
fn folder_with_extras(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(|e| e.unwrap()) {
        if entry.path().is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
    let template = std::fs::read_to_string(Path::new(MODEL).join("chat_template.jinja")).unwrap();
    std::fs::write(to.join("chat_template.jinja"), format!("{EXTRAS}{template}")).unwrap();
}

fn prompt() -> Value {
    json!([{ "role": "system", "content": "Be short." }, { "role": "user", "content": "one two" }])
}

fn row_with_extras() -> Value {
    json!({
        "prompt": prompt(), "completion": [{ "role": "assistant", "content": "three" }],
        "tools": [{ "name": "calc" }], "chat_template_kwargs": { "mood": "calm" },
    })
}

/// The tokens that SFT puts before the completion.
fn sft_prompt(dir: &Path, row: &Value) -> Vec<u32> {
    let tokenizer = Tokenizer::load(dir).unwrap();
    let template = ChatTemplate::of(&tokenizer).unwrap();
    let Value::Object(value) = row.clone() else { panic!("an object") };
    let rows = [Row { value, file: Path::new("r.jsonl").into(), line: 1 }];
    let (examples, _) =
        prepare(&rows, &tokenizer, Some(&template), VOCAB, &SftOptions::default()).unwrap();
    let start = examples[0].target_mask.iter().position(|t| *t).unwrap();
    examples[0].input_ids[..start].to_vec()
}

/// `temper generate` on one row, greedily.
fn greedy(model: &str, data: &str) -> Value {
    let args = [
        "generate",
        "--model",
        model,
        "--device",
        "cpu",
        "--data",
        data,
        "temperature=0",
        "max_new_tokens=12",
    ];
    serde_json::from_str(done(&args).lines().next().unwrap()).unwrap()
}

/// The first completion of `temper grpo` on one row; top_k=1 takes the most probable token.
fn rl(model: &str, data: &str, out: &Path) -> Value {
    let args = [
        "grpo",
        "--model",
        model,
        "--data",
        data,
        "--output",
        out.to_str().unwrap(),
        "device=cpu",
        "reward_funcs=think_format",
        "num_generations=2",
        "per_device_train_batch_size=2",
        "gradient_accumulation_steps=1",
        "max_steps=1",
        "max_completion_length=12",
        "top_k=1",
    ];
    done(&args);
    json_lines(out.join("completions.jsonl")).swap_remove(0)
}

#[test]
fn tools_and_template_kwargs_reach_every_prompt_as_in_sft() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    folder_with_extras(Path::new(MODEL), &model);
    let ids = sft_prompt(&model, &row_with_extras());
    let tokenizer = Tokenizer::load(&model).unwrap();
    let text = tokenizer.decode(&ids, false).unwrap();
    assert!(text.starts_with("<tools>calc<mood>calm<|im_start|>system\nBe short."), "{text}");
    assert!(text.ends_with("<|im_start|>assistant\n"), "{text}");
    // The same row without its completion is a prompt; the ids themselves are the oracle.
    let mut row = row_with_extras();
    row.as_object_mut().unwrap().shift_remove("completion");
    let data = write_rows(dir.path().join("row.jsonl"), &[row]);
    let plain = write_rows(dir.path().join("plain.jsonl"), &[json!({ "prompt": prompt() })]);
    let given = write_rows(dir.path().join("ids.jsonl"), &[json!({ "input_ids": ids })]);
    let model = model.to_str().unwrap();
    let want = greedy(model, &given);
    let got = greedy(model, &data);
    for field in ["completion_ids", "logps"] {
        assert_eq!(got[field], want[field], "{field}");
    }
    assert_ne!(greedy(model, &plain)["logps"], want["logps"], "tools and keywords count");

    let report = dir.path().join("eval.json");
    let args = [
        "eval",
        "--model",
        model,
        "--device",
        "cpu",
        "--data",
        &data,
        "--output",
        report.to_str().unwrap(),
        "reward_funcs=think_format",
        "max_new_tokens=12",
    ];
    done(&args);
    let report: Value = json(report);
    assert_eq!(report["rows"][0]["completions"][0], want["completion"]);
    assert_eq!(rl(model, &data, &dir.path().join("rl"))["completion"], want["completion"]);
}

#[test]
fn a_reward_model_reads_the_tools_of_the_row() {
    let dir = tempfile::tempdir().unwrap();
    let (trained, model) = (dir.path().join("trained"), dir.path().join("model"));
    let pairs = "tests/fixtures/preferences/plain.jsonl";
    let out = trained.to_str().unwrap();
    done(&[
        "reward",
        "--model",
        MODEL,
        "--data",
        pairs,
        "--output",
        out,
        "device=cpu",
        "max_steps=1",
    ]);
    folder_with_extras(&trained, &model);
    let row = row_with_extras();
    let columns = ["tools", "chat_template_kwargs"].map(|name| (name.to_string(), &row[name]));
    let mut batch = RewardBatch::default();
    batch.push(&row["prompt"], std::iter::empty(), "three", Vec::new());
    batch.push(&row["prompt"], columns.iter().map(|(n, v)| (n, *v)), "three", Vec::new());
    let mut cx = cpu();
    let got = RewardModel::load(&cx, &model, &Default::default())
        .unwrap()
        .score(&mut cx, &batch)
        .unwrap();

    let tokenizer = Tokenizer::load(&model).unwrap();
    let texts = ["", "<tools>calc<mood>calm"].map(|extras| {
        let text = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\none two<|im_end|>\n\
                    <|im_start|>assistant\nthree<|im_end|>\n";
        tokenizer.encode(&format!("{extras}{text}"), false).unwrap()
    });
    let sequences: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
    let mut decoder = Decoder::load(&cx, &model).unwrap();
    assert_eq!(got, sequence_scores(&mut cx, &mut decoder, &sequences, 1).unwrap());
    assert_ne!(got[0], got[1]);
}

#[test]
fn rl_stops_where_generate_stops() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    folder_with_extras(Path::new(MODEL), &model);
    let data = write_rows(dir.path().join("row.jsonl"), &[json!({ "prompt": "one two" })]);
    let name = model.to_str().unwrap();
    let free = greedy(name, &data);
    let ids: Vec<u32> = serde_json::from_value(free["completion_ids"].clone()).unwrap();
    assert_eq!((free["finish_reason"].as_str(), ids.len()), (Some("length"), 12), "{free}");
    let end = ids[4];
    let length = 1 + ids.iter().position(|id| *id == end).unwrap();
    let config = json!({ "eos_token_id": [2, end] }).to_string();
    std::fs::write(model.join("generation_config.json"), config).unwrap();
    let (generated, sampled) = (greedy(name, &data), rl(name, &data, &dir.path().join("rl")));
    assert_eq!(generated["completion_ids"].as_array().unwrap().len(), length);
    assert_eq!(generated["finish_reason"], json!("stop"));
    assert_eq!(sampled["completion"], generated["completion"]);
    assert_eq!(sampled["finished"], json!(true));
}

#[test]
fn stop_ids_are_of_the_tokenizer_both_configs_and_the_options() {
    let dir = tempfile::tempdir().unwrap();
    folder_with_extras(Path::new(MODEL), dir.path());
    let config = ModelConfig { eos: vec![9, 7], ..ModelConfig::load(dir.path()).unwrap() };
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let found = |eos: Value, stop: &[&str]| {
        let text = json!({ "eos_token_id": eos }).to_string();
        std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
        let stop: Vec<String> = stop.iter().map(|s| s.to_string()).collect();
        stop_ids(&tokenizer, &config, &stop).map_err(|e| e.to_string())
    };
    let eos = tokenizer.eos_id().unwrap();
    assert_eq!(found(json!([11, 7]), &[]).unwrap(), [eos, 7, 9, 11]);
    assert_eq!(found(json!(null), &["", "o"]).unwrap(), [eos, 7, 9], "a text is no stop token");
    let start = tokenizer.token_to_id("<|im_start|>").unwrap();
    let mut want = vec![start, eos, 7, 9];
    want.sort();
    assert_eq!(found(json!(7), &["<|im_start|>"]).unwrap(), want);
    let wrong = found(json!([7, "x"]), &[]).unwrap_err();
    assert!(wrong.contains("generation_config.json: eos_token_id is \"x\""), "{wrong}");
}

#[test]
fn a_template_comes_from_a_file_or_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let said = |path: Option<&str>| {
        let template = ChatTemplate::choose(path, &tokenizer).map_err(|e| e.to_string())?;
        let text = template.unwrap().render(&prompt(), Default::default()).unwrap().text;
        Ok::<String, String>(text)
    };
    std::fs::write(dir.path().join("t.jinja"), "{{ messages[1].content }}{{ eos_token }}").unwrap();
    assert_eq!(said(Some(&path("t.jinja"))).unwrap(), "one two<|im_end|>");
    let inline = json!({ "chat_template": "{{ messages[0].content }}" }).to_string();
    std::fs::create_dir(path("chat")).unwrap();
    std::fs::write(dir.path().join("chat/tokenizer_config.json"), inline).unwrap();
    assert_eq!(said(Some(&path("chat"))).unwrap(), "Be short.");
    assert!(said(None).unwrap().starts_with("<|im_start|>system"));
    std::fs::create_dir(path("bare")).unwrap();
    assert!(said(Some(&path("bare"))).unwrap_err().contains("bare: holds no chat template"));
    assert!(said(Some(&path("none.jinja"))).unwrap_err().contains("none.jinja"));
}

#[test]
fn prompts_end_with_the_generation_prompt_or_the_last_message() {
    let dir = tempfile::tempdir().unwrap();
    let (tokenizer, template) = tokenizer_and_template();
    let said = |template, vocab, row: Value| {
        let rows = read_rows(&[write_rows(dir.path().join("p.jsonl"), &[row]).into()]).unwrap();
        let ids = Renderer::new(&tokenizer, template, vocab).prompt(&rows[0]);
        let ids = ids.map_err(|e| e.to_string())?.ids;
        tokenizer.decode(&ids, false).map_err(|e| e.to_string())
    };
    let talk = json!([
        { "role": "user", "content": "one" }, { "role": "assistant", "content": "two " }
    ]);
    let user = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo ";
    let fresh = said(Some(&template), VOCAB, json!({ "prompt": talk })).unwrap();
    assert_eq!(fresh, format!("{user}<|im_end|>\n<|im_start|>assistant\n"));
    let kwargs = json!({ "continue_final_message": true });
    let row = json!({ "prompt": talk, "chat_template_kwargs": kwargs });
    assert_eq!(said(Some(&template), VOCAB, row).unwrap(), user);
    // What cannot be a prompt is said with file, line and the next step.
    let place = format!("{}:1: ", dir.path().join("p.jsonl").display());
    for (template, vocab, row, want) in [
        (None, VOCAB, json!({ "prompt": talk }), "has no chat template; add chat_template.jinja"),
        (Some(&template), 9, json!({ "prompt": "one" }), "beyond the model's vocabulary of 9"),
        (Some(&template), VOCAB, json!({ "prompt": "" }), "has no tokens; write"),
        (Some(&template), VOCAB, json!({ "prompt": 3 }), "a string or a list of messages"),
        (Some(&template), VOCAB, json!({ "prompt": talk, "tools": "x" }), "not valid JSON"),
    ] {
        let error = said(template, vocab, row).unwrap_err();
        assert!(error.starts_with(&place) && error.contains(want), "{error}");
    }
}

#[test]
fn a_run_says_that_rows_of_texts_do_not_use_the_chat_template() {
    let dir = tempfile::tempdir().unwrap();
    let said = |content: Value, role: &str, chat: bool| match chat {
        true => json!([{ "role": role, "content": content }]),
        false => content,
    };
    for chat in [false, true] {
        let prompt = said(json!("Hi"), "user", chat);
        let [good, bad] = ["Yes", "No"].map(|text| said(json!(text), "assistant", chat));
        let rows = [
            ("sft", json!({ "prompt": prompt, "completion": good })),
            ("dpo", json!({ "prompt": prompt, "chosen": good, "rejected": bad })),
            ("kto", json!({ "prompt": prompt, "completion": good, "label": true })),
            ("grpo", json!({ "prompt": prompt })),
        ];
        for (method, row) in rows {
            let path = dir.path().join(format!("{method}-{chat}.jsonl"));
            let data = write_rows(&path, &vec![row; 4]);
            let out = dir.path().join(format!("{method}-{chat}")).display().to_string();
            let mut args = vec![method, "--model", MODEL, "--data", &data, "--output", &out];
            args.extend(["--device", "cpu", "max_steps=1", "per_device_train_batch_size=4"]);
            if method == "grpo" {
                args.extend([
                    "reward_funcs=regex:a",
                    "num_generations=2",
                    "max_completion_length=2",
                ]);
            }
            let (code, _, log) = temper(&args);
            assert_eq!(code, Some(0), "{method}: {log}");
            let notes = log.matches("the model's chat template is not used").count();
            assert_eq!(notes, usize::from(!chat), "{method}: {log}");
        }
    }
}
