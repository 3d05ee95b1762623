//! Chat templates, special tokens and masks: those used in training and those recorded in the
//! output.

use std::path::Path;

use serde_json::{Value, json};
use temper::data::chat::ChatTemplate;
use temper::data::format::{Format, RowContent};
use temper::data::render::Renderer;
use temper::data::rows::Row;
use temper::data::sft::{SftOptions, prepare};
use temper::data::tokenizer::Tokenizer;
use temper::model::layout::ModelConfig;
use temper::train::state::parts_of;

use crate::support::{MODEL, tokenizer};

/// ChatML, with `head` after the assistant's header and a tag on each side of the turn.
fn chatml(head: &str, open: &str, close: &str) -> String {
    format!(
        "{{%- set ns = namespace(last=0) %}}{{%- for m in messages %}}{{%- if m.role == 'user' %}}\
         {{%- set ns.last = loop.index0 %}}{{%- endif %}}{{%- endfor %}}\
         {{%- for m in messages %}}{{{{- '<|im_start|>' + m.role + '\\n' }}}}\
         {{%- if m.role == 'assistant' %}}{open}{head}{{{{- m.content + '<|im_end|>\\n' }}}}{close}\
         {{%- else %}}{{{{- m.content + '<|im_end|>\\n' }}}}{{%- endif %}}{{%- endfor %}}\
         {{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n' }}}}{{%- endif %}}"
    )
}

fn row(value: Value) -> Row {
    let Value::Object(value) = value else { unreachable!() };
    Row { value, file: Path::new("t").into(), line: 1 }
}

fn talks() -> Vec<Row> {
    let turn = |role: &str, text: String| json!({ "role": role, "content": text });
    let talk = |n: usize| {
        let mut all = vec![turn("user", format!("question {n}"))];
        for i in 0..n % 4 {
            all.push(turn("assistant", format!("é answer {i} of {n}{}", " ".repeat(i))));
            all.push(turn("user", "the same".into()));
        }
        all.push(turn("assistant", ["yes", "the same", "<b>"][n % 3].to_string()));
        row(json!({ "messages": all }))
    };
    (0..400).map(talk).collect()
}

#[test]
fn masks_without_generation_tags_equal_those_with_them() {
    let tokenizer = tokenizer();
    let options = SftOptions { assistant_only_loss: true, max_length: None, ..Default::default() };
    // Nothing before a turn; Qwen3's reasoning, which only the last turn keeps; always some.
    let heads = [
        "",
        "{%- if loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}",
        "{{- '<think>\\n' }}",
    ];
    for head in heads {
        let compile = |open: &str, close: &str| {
            let source = chatml(head, open, close);
            ChatTemplate::new(&source, Path::new("t"), tokenizer.special_tokens()).unwrap()
        };
        let tagged = compile("{%- generation %}", "{%- endgeneration %}");
        let plain = compile("", "");
        let make =
            |t: &ChatTemplate| prepare(&talks(), &tokenizer, Some(t), 320, &options).unwrap();
        assert_eq!(make(&plain).0, make(&tagged).0, "{head}");
    }
}

#[test]
fn a_turn_that_cannot_be_found_is_an_error_that_shows_it() {
    let tokenizer = tokenizer();
    let source =
        "{% for m in messages %}{{ messages | length }}{{ m.content | upper }}{% endfor %}";
    let template = ChatTemplate::new(source, Path::new("t"), tokenizer.special_tokens()).unwrap();
    let options = SftOptions { assistant_only_loss: true, ..Default::default() };
    let e = prepare(&talks()[1..2], &tokenizer, Some(&template), 320, &options).unwrap_err();
    assert!(e.to_string().contains("messages[1] (\"é answer 0 of 1\")"), "{e}");
}

/// A copy of the fixture's tokenizer with other entries in tokenizer_config.json.
fn copy(change: Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let model = Path::new(MODEL);
    std::fs::copy(model.join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    std::fs::copy(model.join("config.json"), dir.path().join("config.json")).unwrap();
    let text = std::fs::read_to_string(model.join("tokenizer_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (key, value) in change.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

fn saved(tokenizer: &Tokenizer) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in tokenizer.saved_files().unwrap() {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

#[test]
fn a_template_is_chosen_by_tools_and_all_are_saved() {
    let list = json!([{ "name": "default", "template": "plain" },
                      { "name": "tool_use", "template": "{{ tools[0].name }}" }]);
    let inline = copy(json!({ "chat_template": list }));
    let files = copy(json!({ "chat_template": null }));
    std::fs::write(files.path().join("chat_template.jinja"), "plain").unwrap();
    let more = files.path().join("additional_chat_templates");
    std::fs::create_dir(&more).unwrap();
    std::fs::write(more.join("tool_use.jinja"), "{{ tools[0].name }}").unwrap();
    for dir in [&inline, &files] {
        let out = saved(&Tokenizer::load(dir.path()).unwrap());
        for dir in [dir, &out] {
            let tokenizer = Tokenizer::load(dir.path()).unwrap();
            let template = ChatTemplate::of(&tokenizer).unwrap();
            let renderer = Renderer::new(&tokenizer, Some(&template), 320);
            let text = |row: Row| {
                let example = Format::Messages.parse(&row, "").unwrap();
                let RowContent::Messages(messages) = &example.content else { unreachable!() };
                renderer.render(&row, &example, messages, false).unwrap().text
            };
            let messages = json!([{ "role": "user", "content": "a" }]);
            assert_eq!(text(row(json!({ "messages": messages }))), "plain");
            let tools = json!([{ "name": "f" }]);
            assert_eq!(text(row(json!({ "messages": messages, "tools": tools }))), "f");
        }
    }
}

#[test]
fn saved_files_have_the_template_and_eos_of_the_options() {
    let dir = copy(json!({ "chat_template": "old" }));
    let template = dir.path().join("new.jinja");
    std::fs::write(&template, "new {{ eos_token }}").unwrap();
    let mut tokenizer = Tokenizer::load(dir.path()).unwrap();
    let before = tokenizer.eos_id().unwrap();
    let other = tokenizer.id_to_token(0).unwrap();
    tokenizer.take_template(&template).unwrap();
    tokenizer.take_eos(&other).unwrap();
    let mut config = ModelConfig::load(dir.path()).unwrap();
    let parts = parts_of(&tokenizer, &mut config, None).unwrap();
    let stop = parts.generation_config.unwrap()["eos_token_id"].clone();
    assert_eq!(stop[0], 0);
    assert!(stop.as_array().unwrap().contains(&json!(before)) || before == 0, "{stop}");
    assert_eq!(config.eos[0], 0);
    let out = saved(&tokenizer);
    let read = Tokenizer::load(out.path()).unwrap();
    assert_eq!(
        (read.chat_template(), read.eos_token()),
        (Some("new {{ eos_token }}"), Some(other.as_str()))
    );
    assert!(
        tokenizer.take_eos("<nope>").unwrap_err().to_string().contains("not in the vocabulary")
    );
}

#[test]
fn extra_special_tokens_are_one_id_whatever_names_them() {
    let plain = tokenizer();
    let known = plain.vocab_size();
    let word = (0..known as u32)
        .filter_map(|id| plain.id_to_token(id))
        .find(|t| t.chars().count() > 2 && t.chars().all(|c| c.is_ascii_lowercase()))
        .unwrap();
    let id = plain.token_to_id(&word).unwrap();
    for change in [
        json!({ "extra_special_tokens": [word] }),
        json!({ "additional_special_tokens": [word] }),
        json!({ "extra_special_tokens": { "x_token": word } }),
    ] {
        let dir = copy(change.clone());
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(tokenizer.decode(&[id], true).unwrap(), "", "{change}");
        assert_eq!(tokenizer.encode(&word, false).unwrap(), [id], "{change}");
    }
    // The oldest form: a file of its own, where tokenizer_config.json has no added_tokens_decoder.
    let dir = copy(json!({ "additional_special_tokens": [word] }));
    let path = dir.path().join("tokenizer_config.json");
    let mut config = crate::support::json(&path);
    config.as_object_mut().unwrap().remove("added_tokens_decoder");
    std::fs::write(&path, config.to_string()).unwrap();
    let new = "<zqx>".to_string();
    let next = known as u32;
    let added = json!({ word.clone(): id, new.clone(): next });
    std::fs::write(dir.path().join("added_tokens.json"), added.to_string()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(tokenizer.encode(&word, false).unwrap(), [id]);
    assert_eq!(tokenizer.decode(&[id], true).unwrap(), "", "it is special");
    assert_eq!(tokenizer.encode(&new, false).unwrap(), [next]);
    assert_eq!(tokenizer.decode(&[next], true).unwrap(), new, "it is not special");
}
