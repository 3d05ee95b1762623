//! What a resumed run compares: the contents of rows, templates, tokenizers, models and rewards.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::support::{MODEL, command, finish, write_rows};

pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

/// A model, rows and an output folder of which any part can be changed between two starts.
pub struct Setup {
    dir: tempfile::TempDir,
}

impl Setup {
    pub fn new() -> Setup {
        let setup = Setup { dir: tempfile::tempdir().unwrap() };
        copy(Path::new(MODEL), &setup.path("model"));
        setup.rows("rows.jsonl", 8);
        setup
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn rows(&self, name: &str, first: usize) -> String {
        let row = |i: usize| {
            json!({"prompt": format!("say {i}"), "completion": format!("{i}"),
                "answer": i.to_string()})
        };
        let rows: Vec<_> = (first..first + 8).map(row).collect();
        write_rows(self.path(name), &rows)
    }

    fn command(&self, method: &str, model: &str, rows: &str, more: &[&str]) -> Command {
        let mut command = command(&[method, "--model"]);
        command.arg(self.path(model)).arg("--data").arg(self.path(rows)).arg("--output");
        command.arg(self.path("out"));
        command.args(["max_steps=4", "save_steps=2", "per_device_train_batch_size=2"]).args(more);
        command
    }

    /// Trains to the end; then the newest checkpoint and the model go, so that there is a rest to
    /// resume.
    pub fn first(&self, method: &str, more: &[&str]) {
        let (code, said) = finish(&mut self.command(method, "model", "rows.jsonl", more));
        assert_eq!(code, Some(0), "{said}");
        std::fs::remove_dir_all(self.path("out/checkpoint-4")).unwrap();
    }

    pub fn resume(
        &self,
        method: &str,
        model: &str,
        rows: &str,
        more: &[&str],
    ) -> (Option<i32>, String) {
        finish(self.command(method, model, rows, more).arg("--resume"))
    }
}

#[test]
fn moved_and_renamed_inputs_continue_with_the_same_bytes() {
    let s = Setup::new();
    s.first("sft", &[]);
    let weights = std::fs::read(s.path("out/model.safetensors")).unwrap();
    std::fs::remove_file(s.path("out/model.safetensors")).unwrap();
    std::fs::rename(s.path("model"), s.path("moved")).unwrap();
    std::fs::rename(s.path("rows.jsonl"), s.path("other.jsonl")).unwrap();
    let (code, said) = s.resume("sft", "moved", "other.jsonl", &[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(std::fs::read(s.path("out/model.safetensors")).unwrap() == weights);
}

#[test]
fn changed_rows_are_refused_and_named_even_if_as_many() {
    let s = Setup::new();
    s.first("sft", &[]);
    s.rows("rows.jsonl", 30);
    let (code, said) = s.resume("sft", "model", "rows.jsonl", &[]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("training rows: the contents have changed (8 rows)"), "{said}");
    assert!(said.contains("resume_with_changes=true"), "{said}");
    let (code, said) = s.resume("sft", "model", "rows.jsonl", &["resume_with_changes=true"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("training rows"), "{said}");
}

#[test]
fn reordered_rows_are_refused() {
    let s = Setup::new();
    s.first("sft", &[]);
    let text = std::fs::read_to_string(s.path("rows.jsonl")).unwrap();
    let lines: Vec<&str> = text.lines().rev().collect();
    std::fs::write(s.path("rows.jsonl"), lines.join("\n")).unwrap();
    let (code, said) = s.resume("sft", "model", "rows.jsonl", &[]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("training rows"), "{said}");
}

#[test]
fn a_changed_base_template_or_special_token_is_refused() {
    let s = Setup::new();
    s.first("sft", &["use_peft=true"]);
    let pristine = s.path("pristine");
    copy(&s.path("model"), &pristine);
    // One bit of a weight, the last byte of the file.
    let weights = s.path("model/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let (code, said) = s.resume("sft", "model", "rows.jsonl", &["use_peft=true"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("\n  model: the contents have changed"), "{said}");

    std::fs::remove_dir_all(s.path("model")).unwrap();
    copy(&pristine, &s.path("model"));
    let template = s.path("template.jinja");
    std::fs::write(&template, "{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    let option = format!("chat_template_path={}", template.display());
    let (code, said) = s.resume("sft", "model", "rows.jsonl", &["use_peft=true", &option]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("chat template: was "), "{said}");

    let path = s.path("model/tokenizer_config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["bos_token"] = config["eos_token"].clone();
    std::fs::write(&path, config.to_string()).unwrap();
    let (code, said) = s.resume("sft", "model", "rows.jsonl", &["use_peft=true"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("special tokens: was "), "{said}");
}

#[test]
fn a_changed_reference_or_teacher_is_refused() {
    let pairs = json!({"prompt": "p", "chosen": "good", "rejected": "bad"});
    for (method, option, name) in [
        ("dpo", "ref_model", "reference model"),
        ("distill", "teacher_model_name_or_path", "teacher model"),
    ] {
        let s = Setup::new();
        copy(Path::new(MODEL), &s.path("second"));
        if method == "dpo" {
            write_rows(s.path("rows.jsonl"), &vec![pairs.clone(); 8]);
        }
        let option = format!("{option}={}", s.path("second").display());
        s.first(method, &[&option]);
        let weights = s.path("second/model.safetensors");
        let mut bytes = std::fs::read(&weights).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&weights, bytes).unwrap();
        let (code, said) = s.resume(method, "model", "rows.jsonl", &[&option]);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains(&format!("{name}: the contents have changed")), "{said}");
    }
}

#[test]
fn rows_of_online_methods_are_compared_with_their_columns() {
    let s = Setup::new();
    let options =
        ["reward_funcs=exact_match:column=answer", "num_generations=2", "max_completion_length=4"];
    s.first("grpo", &options);
    let text = std::fs::read_to_string(s.path("rows.jsonl")).unwrap();
    let other = text.replace("\"answer\":\"9\"", "\"answer\":\"99\"");
    assert_ne!(text, other);
    std::fs::write(s.path("rows.jsonl"), other).unwrap();
    let (code, said) = s.resume("grpo", "model", "rows.jsonl", &options);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("training rows"), "{said}");
}

#[test]
fn a_changed_reward_is_a_warning() {
    let s = Setup::new();
    let options = ["num_generations=2", "max_completion_length=4"];
    let with = |reward: &'static str| [options[0], options[1], reward];
    s.first("grpo", &with("reward_funcs=length:min=1"));
    let (code, said) = s.resume("grpo", "model", "rows.jsonl", &with("reward_funcs=length:min=2"));
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("a reward has changed"), "{said}");
}

#[test]
fn a_checkpoint_without_inputs_says_that_they_are_not_compared() {
    let s = Setup::new();
    s.first("sft", &[]);
    let checkpoint = s.path("out/checkpoint-2");
    std::fs::remove_file(checkpoint.join("inputs.json")).unwrap();
    // As a version that did not write the file: a manifest without it.
    let files: Vec<(String, Vec<u8>)> = std::fs::read_dir(&checkpoint)
        .unwrap()
        .map(|e| e.unwrap())
        .filter(|e| e.file_name() != "MANIFEST")
        .map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap()))
        .collect();
    std::fs::remove_dir_all(&checkpoint).unwrap();
    let mut writer = temper::checkpoint::CheckpointWriter::new(s.path("out"), 2, 0).unwrap();
    files.iter().for_each(|(name, bytes)| writer.add_file(name, bytes).unwrap());
    writer.finish().unwrap();
    let (code, said) = s.resume("sft", "model", "rows.jsonl", &[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("are not compared"), "{said}");
}
