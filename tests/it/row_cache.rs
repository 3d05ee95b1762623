//! Tokenised rows that a second start reads from a file.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::support::{MODEL, command, finish, write_rows};

struct Setup {
    dir: tempfile::TempDir,
    pairs: bool,
}

const HIT: &str = "tokenised rows are read from ";

impl Setup {
    fn new() -> Setup {
        Setup::of("sft")
    }

    /// With rows of the method's kind.
    fn of(method: &str) -> Setup {
        let pairs = ["dpo", "reward", "orpo", "cpo"].contains(&method);
        let setup = Setup { dir: tempfile::tempdir().unwrap(), pairs };
        setup.rows("a");
        setup
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn rows(&self, word: &str) {
        let row = |i: usize| match self.pairs {
            true => json!({ "prompt": format!("{word} {i}"), "chosen": " y", "rejected": " z" }),
            false => {
                json!({ "prompt": format!("{word} {i}"), "completion": " x", "label": i.is_multiple_of(2) })
            }
        };
        write_rows(self.path("rows.jsonl"), &(0..8).map(row).collect::<Vec<_>>());
    }

    /// Trains into `out`: what was said, and the model's bytes.
    fn train(&self, method: &str, out: &str, more: &[&str]) -> (String, Vec<u8>) {
        let mut command = command(&[method, "--model", MODEL, "--data"]);
        command.arg(self.path("rows.jsonl")).arg("--output").arg(self.path(out));
        command.arg(format!("data_cache={}", self.path("cache").display()));
        command.args(["max_steps=4", "save_steps=2", "per_device_train_batch_size=2"]).args(more);
        let (code, said) = finish(&mut command);
        assert_eq!(code, Some(0), "{method}: {said}");
        let model = std::fs::read(self.path(out).join("model.safetensors")).unwrap();
        (said, model)
    }

    fn stored(&self) -> Vec<PathBuf> {
        let rows = |p: &PathBuf| p.extension().is_some_and(|e| e == "rows");
        let entries = std::fs::read_dir(self.path("cache")).unwrap();
        entries.map(|e| e.unwrap().path()).filter(rows).collect()
    }
}

fn digests(out: &Path) -> String {
    std::fs::read_to_string(out.join("checkpoint-4/inputs.json")).unwrap()
}

#[test]
fn a_second_start_has_the_same_rows_digests_and_bytes_for_every_method() {
    let teacher = "teacher_model_name_or_path=tests/fixtures/sft/model";
    for (method, more) in [
        ("sft", &["eval_rows=2", "eval_strategy=steps"][..]),
        ("sft", &["packing=true", "max_length=64"]),
        ("dpo", &["eval_rows=2", "eval_strategy=steps"]),
        ("reward", &[]),
        ("orpo", &[]),
        ("cpo", &[]),
        ("kto", &[]),
        ("distill", &[teacher]),
    ] {
        let setup = Setup::of(method);
        let (first, one) = setup.train(method, "one", more);
        assert!(!first.contains(HIT), "{method}: {first}");
        let (second, two) = setup.train(method, "two", more);
        assert!(second.contains(HIT), "{method}: {second}");
        assert!(one == two, "{method}");
        assert_eq!(digests(&setup.path("one")), digests(&setup.path("two")), "{method}");
        let summary = |said: &str| said.lines().find(|l| l.contains(" read, ")).map(String::from);
        assert!(summary(&first).is_some());
        assert_eq!(summary(&first), summary(&second), "{method}");
    }
}

#[test]
fn sample_prompts_are_the_same_prompts_at_a_second_start() {
    // Whether the rows are conversations decides what a text of sample_prompts is.
    for talks in [false, true] {
        let setup = Setup::new();
        if talks {
            std::fs::copy("tests/fixtures/sft/messages.jsonl", setup.path("rows.jsonl")).unwrap();
        }
        let more = ["eval_rows=2", "eval_strategy=steps", "eval_steps=2", "sample_prompts=Who?"];
        let (first, one) = setup.train("sft", "one", &more);
        let (second, two) = setup.train("sft", "two", &more);
        assert!(!first.contains(HIT) && second.contains(HIT) && one == two, "{second}");
        let said = |out: &str| std::fs::read(setup.path(out).join("completions.jsonl")).unwrap();
        assert!(!said("one").is_empty() && said("one") == said("two"));
        assert_eq!(String::from_utf8(said("two")).unwrap().contains("\"user\""), talks);
    }
}

#[test]
fn steps_with_labels_come_back_from_the_cache() {
    let setup = Setup::new();
    std::fs::copy("tests/fixtures/preferences/steps.jsonl", setup.path("rows.jsonl")).unwrap();
    let (_, one) = setup.train("prm", "one", &[]);
    let (said, two) = setup.train("prm", "two", &[]);
    assert!(said.contains(HIT) && one == two, "{said}");
}

#[test]
fn whatever_changes_the_rows_makes_them_anew() {
    let setup = Setup::new();
    let hit = |out: &str, more: &[&str]| setup.train("sft", out, more).0.contains(HIT);
    assert!(!hit("a", &[]));
    assert!(!hit("b", &["max_length=7"]));
    assert!(!hit("c", &["chat_template_kwargs={\"a\": 1}"]));
    assert!(!hit("d", &["eos_token=<|im_start|>"]));
    assert!(!hit("e", &["eval_rows=1", "eval_strategy=steps"]));
    assert!(!hit("f", &["columns=prompt:completion,completion:prompt"]));
    assert!(hit("g", &["learning_rate=1e-3", "seed=9", "gradient_accumulation_steps=2"]));
    setup.rows("b"); // the same size
    assert!(!hit("h", &[]));
    setup.rows("a");
    assert!(hit("i", &[]), "the same contents, written again");
    std::fs::rename(setup.path("rows.jsonl"), setup.path("moved.jsonl")).unwrap();
    std::os::unix::fs::symlink(setup.path("moved.jsonl"), setup.path("rows.jsonl")).unwrap();
    assert!(hit("j", &[]), "the same contents in another place");
}

#[test]
fn a_damaged_cache_is_told_and_made_again() {
    let setup = Setup::new();
    let (_, one) = setup.train("sft", "one", &[]);
    let [path] = &setup.stored()[..] else { panic!("one cache file") };
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    std::fs::write(path, &bytes).unwrap();
    let (said, two) = setup.train("sft", "two", &[]);
    assert!(said.contains("its checksum is wrong, so the rows are tokenised again"), "{said}");
    assert!(one == two);
    assert!(setup.train("sft", "three", &[]).0.contains(HIT));
}

#[test]
fn a_resumed_run_takes_the_cache_and_continues() {
    let setup = Setup::new();
    let (_, one) = setup.train("sft", "one", &[]);
    std::fs::remove_dir_all(setup.path("one/checkpoint-4")).unwrap();
    let (said, two) = setup.train("sft", "one", &["--resume"]);
    assert!(said.contains(HIT) && said.contains("resumed at step 2") && one == two, "{said}");
}

#[test]
fn starts_at_the_same_time_and_a_folder_that_takes_no_file_end_no_run() {
    let setup = Setup::new();
    std::thread::scope(|scope| {
        let start = |i: usize| setup.train("sft", &format!("out{i}"), &[]).1;
        let runs: Vec<_> = (0..3).map(|i| scope.spawn(move || start(i))).collect();
        let models: Vec<Vec<u8>> = runs.into_iter().map(|run| run.join().unwrap()).collect();
        assert!(models.iter().all(|model| *model == models[0]));
    });
    assert_eq!(setup.stored().len(), 1);
    let leftover = |p: &PathBuf| p.to_string_lossy().contains(".rows.");
    let entries = std::fs::read_dir(setup.path("cache")).unwrap();
    assert_eq!(entries.map(|e| e.unwrap().path()).filter(leftover).count(), 0);

    let closed = Setup::new();
    std::fs::write(closed.path("cache"), "a file where the folder would be").unwrap();
    let (said, _) = closed.train("sft", "out", &[]);
    assert!(said.contains("tokenised rows are not kept for the next start"), "{said}");
}

#[test]
fn small_files_are_not_kept_unless_a_folder_is_named() {
    let setup = Setup::new();
    let mut command = command(&["sft", "--model", MODEL, "--data"]);
    command.arg(setup.path("rows.jsonl")).arg("--output").arg(setup.path("out"));
    command.env("TEMPER_CACHE", setup.path("cache")).arg("max_steps=1");
    let (code, said) = finish(&mut command);
    assert!(code == Some(0) && !setup.path("cache").exists(), "{said}");
}
