//! Run files in YAML and JSON.

use std::fmt::Write;
use std::time::{Duration, Instant};

use temper::config::{PeftConfig, TrainingConfig, load};

fn read(name: &str, text: &str) -> Result<(TrainingConfig, PeftConfig), String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    let (mut training, mut peft) = (TrainingConfig::default(), PeftConfig::default());
    let read = load(&mut [&mut training, &mut peft], Some(&path), &[]);
    read.map(|_| (training, peft)).map_err(|e| e.to_string())
}

#[test]
fn the_same_options_in_three_languages_are_the_same_run() {
    let toml = "learning_rate = 1e-5\nmax_steps = 7\nuse_peft = true\nsave_total_limit = \"none\"\n\
        lora_target_modules = [\"q_proj\", \"v_proj\"]\nwarmup_steps = 0.1\n";
    let yaml = "# TRL's file\nmodel_name_or_path: org/name\ndataset_name: org/rows\n\
        learning_rate: 1e-5\nmax_steps: 7\nuse_peft: true\nsave_total_limit: null\n\
        lora_target_modules:\n- q_proj\n- v_proj\nwarmup_steps: 0.1\nreport_to: none\nbf16: false\n";
    let json = r#"{"learning_rate": 1e-5, "max_steps": 7, "use_peft": true,
        "save_total_limit": null, "lora_target_modules": ["q_proj", "v_proj"],
        "warmup_steps": 0.1}"#;
    let (mut training, peft) = read("run.toml", toml).unwrap();
    let from_json = read("run.json", json).unwrap();
    assert_eq!(from_json, (training.clone(), peft.clone()));
    training.dtype = temper::config::Dtype::Float32; // bf16: false
    assert_eq!(read("run.yaml", yaml).unwrap(), (training.clone(), peft.clone()));
    assert_eq!(read("run.yml", yaml).unwrap(), (training, peft));
}

#[test]
fn an_error_in_a_yaml_file_names_its_line() {
    for (text, line) in [
        ("max_steps: 7\nlearning_rate: fast\n", ":2: learning_rate = fast: expected a number"),
        ("max_steps: 7\n\nlearning_rat: 1e-5\n", ":3: unknown option learning_rat"),
        ("max_steps: 7\nseed: 1\nseed: 2\n", "line 3"),
        ("max_steps: 7\n  seed: [1\n", "line 2"),
    ] {
        let error = read("run.yaml", text).unwrap_err();
        assert!(error.contains("run.yaml") && error.contains(line), "{text}: {error}");
    }
    let error = read("run.json", "{\n \"seed\": \"a\"\n}").unwrap_err();
    assert!(error.contains("run.json:2: seed"), "{error}");
}

#[test]
fn bombs_and_deep_nesting_in_yaml_are_errors_at_once() {
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
    for i in 1..30 {
        let before = i - 1;
        writeln!(bomb, "a{i}: &a{i} [{}]", vec![format!("*a{before}"); 9].join(", ")).unwrap();
    }
    let lists = format!("seed: {}1{}", "[".repeat(100_000), "]".repeat(100_000));
    let open = format!("seed: {}", "[".repeat(100_000));
    let maps: String = (0..2_000).map(|i| format!("{}a:\n", " ".repeat(i))).collect();
    let recursive = "seed: &a [*a]\n".to_string();
    let many: String = (0..100_000).map(|i| format!("k{i}: 1\n")).collect();
    let not_a_map = "- 1\n- 2\n".to_string();
    for text in [bomb, lists, open, maps, recursive, many, not_a_map] {
        for name in ["run.yaml", "run.json"] {
            let start = Instant::now();
            assert!(read(name, &text).is_err(), "{}", &text[..30.min(text.len())]);
            assert!(start.elapsed() < Duration::from_secs(2), "{}", &text[..30.min(text.len())]);
        }
    }
}

#[test]
fn every_example_run_file_is_read_by_the_command_in_its_head() {
    let mut seen = 0;
    for entry in std::fs::read_dir("examples/runs").unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "toml") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("#   temper ")).unwrap();
        let config = format!("--config {}", path.display());
        assert!(line.contains(&config) && text.contains("# Measured ("), "{}", path.display());
        let entry = temper::methods::registry::find(line.split(' ').next().unwrap()).unwrap();
        let keys: Vec<String> = line
            .split(' ')
            .filter(|word| word.contains('=') && !word.starts_with('-'))
            .map(String::from)
            .collect();
        let mut run = (entry.run)();
        let notes = run.read(Some(&path), &keys, 0);
        assert_eq!(notes.map_err(|e| e.to_string()), Ok(vec![]), "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 10, "{seen} run files");
}
