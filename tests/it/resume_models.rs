//! Every model that a run is made from is compared when it is resumed: another one is named and
//! refused, or taken where that is asked for; the same in another folder continues.

use std::path::Path;

use serde_json::{Value, json};

use crate::online_plan::reward_model;
use crate::resume_inputs::{Setup, copy};
use crate::support::{MODEL, command, finish, write_rows};

/// Another value in the last weight of a folder.
fn change(dir: &Path) {
    let name = ["adapter_model.safetensors", "model.safetensors"];
    let path = name.map(|n| dir.join(n)).into_iter().find(|path| path.is_file()).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let low = bytes.len() - 4;
    bytes[low] ^= 1;
    std::fs::write(&path, bytes).unwrap();
}

/// A run of `method` with a model in the folder `second`, which `option` names (`--adapter`, or
/// `key=`); `name` is what a message calls it.
struct Case<'a> {
    setup: &'a Setup,
    method: &'a str,
    option: &'a str,
    name: &'a str,
    more: &'a [&'a str],
}

impl Case<'_> {
    fn given(&self, folder: &str) -> Vec<String> {
        let path = self.setup.path(folder).display().to_string();
        let option = match self.option.strip_suffix('=') {
            Some(_) => vec![format!("{}{path}", self.option)],
            None => vec![self.option.to_string(), path],
        };
        option.into_iter().chain(self.more.iter().map(|m| m.to_string())).collect()
    }

    fn resume(&self, folder: &str, also: &[&str]) -> (Option<i32>, String) {
        let given = self.given(folder);
        let all: Vec<&str> = given.iter().map(String::as_str).chain(also.iter().copied()).collect();
        self.setup.resume(self.method, "model", "rows.jsonl", &all)
    }

    /// The trained weights, and the last checkpoint gone, so that there is a rest to resume.
    fn result(&self) -> Vec<u8> {
        let names = ["out/adapter_model.safetensors", "out/model.safetensors"];
        let path = names.map(|n| self.setup.path(n)).into_iter().find(|p| p.is_file()).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        let last = self.setup.path("out/checkpoint-4");
        if last.is_dir() {
            std::fs::remove_dir_all(last).unwrap();
        }
        bytes
    }

    fn check(&self) {
        let Case { setup, method, name, .. } = self;
        let first = self.given("second");
        setup.first(method, &first.iter().map(String::as_str).collect::<Vec<_>>());
        let whole = self.result();

        // The same contents in another folder continue.
        std::fs::rename(setup.path("second"), setup.path("moved")).unwrap();
        let (code, said) = self.resume("moved", &[]);
        assert_eq!(code, Some(0), "{method}: {said}");
        assert!(self.result() == whole, "{method}");

        // Other contents under the old name do not.
        std::fs::rename(setup.path("moved"), setup.path("second")).unwrap();
        change(&setup.path("second"));
        let (code, said) = self.resume("second", &[]);
        assert_eq!(code, Some(2), "{method}: {said}");
        let what =
            format!("\n  {name}: the contents have changed ({})", setup.path("second").display());
        assert!(said.contains(&what) && said.contains("resume_with_changes=true"), "{said}");
        let others = said.lines().filter(|line| line.starts_with("  ") && line.contains(": "));
        assert_eq!(others.count(), 1, "{said}");

        // Unless that is what is wanted.
        let (code, said) = self.resume("second", &["resume_with_changes=true"]);
        assert_eq!(code, Some(0), "{method}: {said}");
        assert!(said.contains(&what[1..]), "{said}");
    }
}

fn rows(setup: &Setup, row: Value) {
    write_rows(setup.path("rows.jsonl"), &vec![row; 8]);
}

const ONLINE: [&str; 2] = ["num_generations=2", "max_completion_length=4"];

#[test]
fn another_base_is_refused_and_a_moved_one_continues() {
    for more in [&[][..], &["use_peft=true"], &["use_peft=true", "load_in_4bit=true"]] {
        let setup = &Setup::new();
        let resume =
            |also: &[&str]| setup.resume("sft", "moved", "rows.jsonl", &[more, also].concat());
        let case = Case { setup, method: "sft", option: "", name: "model", more };
        setup.first("sft", more);
        let whole = case.result();
        std::fs::rename(setup.path("model"), setup.path("moved")).unwrap();
        let (code, said) = resume(&[]);
        assert_eq!(code, Some(0), "{said}");
        assert!(case.result() == whole);
        change(&setup.path("moved"));
        let (code, said) = resume(&[]);
        assert_eq!(code, Some(2), "{said}");
        assert!(
            said.contains("\n  model: ") && said.contains("resume_with_changes=true"),
            "{said}"
        );
        let (code, said) = resume(&["resume_with_changes=true"]);
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("  model: "), "{said}");
    }
}

#[test]
fn another_adapter_is_refused_and_a_moved_one_continues() {
    let setup = Setup::new();
    let mut make = command(&["sft", "--model", MODEL, "--data"]);
    make.arg(setup.path("rows.jsonl")).arg("--output").arg(setup.path("second"));
    let (code, said) = finish(make.args(["max_steps=1", "use_peft=true", "save_strategy=no"]));
    assert_eq!(code, Some(0), "{said}");
    let more = &["use_peft=true"];
    Case { setup: &setup, method: "sft", option: "--adapter", name: "adapter", more }.check();
}

#[test]
fn another_reference_is_refused_and_a_moved_one_continues() {
    let pair = json!({ "prompt": "p", "chosen": "good", "rejected": "bad" });
    for (method, more) in
        [("dpo", &[][..]), ("dpo", &["precompute_ref_log_probs=true"]), ("kto", &[])]
    {
        let setup = Setup::new();
        copy(Path::new(MODEL), &setup.path("second"));
        rows(&setup, pair.clone());
        let name = "reference model";
        Case { setup: &setup, method, option: "ref_model=", name, more }.check();
    }
}

#[test]
fn another_teacher_is_refused_and_a_moved_one_continues() {
    for (method, more) in [("distill", &[][..]), ("gkd", &["max_new_tokens=4", "lmbda=0.5"])] {
        let setup = Setup::new();
        copy(Path::new(MODEL), &setup.path("second"));
        let (option, name) = ("teacher_model_name_or_path=", "teacher model");
        Case { setup: &setup, method, option, name, more }.check();
    }
}

#[test]
fn another_reward_model_is_refused_and_a_moved_one_continues() {
    for method in ["grpo", "online-dpo"] {
        let setup = Setup::new();
        let made = tempfile::tempdir().unwrap();
        copy(Path::new(&reward_model(made.path())), &setup.path("second"));
        let more = if method == "grpo" { &ONLINE[..] } else { &["max_new_tokens=4"] };
        let (option, name) = ("reward_model=", "reward model");
        let case = Case { setup: &setup, method, option, name, more };
        case.check();
        // What it reads is written by its own template.
        case.result();
        let template = setup.path("second/chat_template.jinja");
        std::fs::write(template, "{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
        let (code, said) = case.resume("second", &[]);
        assert_eq!(code, Some(2), "{said}");
        assert!(
            said.contains("tokenizer of the reward model: the contents have changed"),
            "{said}"
        );
    }
}
