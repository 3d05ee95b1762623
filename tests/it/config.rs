//! Run files: TRL's defaults, overrides, and every problem at once.

use std::path::PathBuf;

use temper::config::{
    Amount, Dtype, GenerateConfig, GradientCheckpointing, Section, TrainingConfig, When, changes,
    help, load, markdown,
};
use temper::data::packing::PackingStrategy;
use temper::error::Error;
use temper::methods::offline::sft::SftRun;

use crate::support::{fixture, json, words};

fn from(file: &str, overrides: &str) -> Result<(SftRun, Vec<String>), Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    std::fs::write(&path, file).unwrap();
    SftRun::load(Some(&path), &words(overrides))
}

fn problems(file: &str, overrides: &str) -> Vec<String> {
    let error = from(file, overrides).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string().lines().map(str::to_string).collect()
}

/// Every field of TRL's SFTConfig at its default, as a run file.
fn trl_dump() -> (String, serde_json::Map<String, serde_json::Value>) {
    let serde_json::Value::Object(trl) = json(fixture("sft_defaults.json")) else { panic!() };
    let lines = trl.iter().map(|(k, v)| {
        format!("{k} = {}\n", if v.is_null() { "\"none\"".into() } else { v.to_string() })
    });
    (lines.collect(), trl)
}

#[test]
fn the_defaults_are_those_of_trl() {
    let (_, trl) = trl_dump();
    let (run, notes) = SftRun::load(None, &[]).unwrap();
    assert!(notes.is_empty());
    let mut compared = 0;
    // The adapter's keys are of another of TRL's configs.
    for key in run.training.keys().into_iter().chain(run.method.keys()) {
        let Some(theirs) = trl.get(key.name) else {
            assert!(key.doc.starts_with("Ours."), "{} is not TRL's: its doc must say so", key.name);
            continue;
        };
        if ["optim", "gradient_checkpointing", "report_to"].contains(&key.name) {
            continue; // another name for the same; chosen by the memory plan, which changes no number; a list here, TRL writes the one word
        }
        compared += 1;
        let ours = match &key.value {
            toml::Value::String(s) if s == "none" => serde_json::Value::Null,
            toml::Value::Float(f) => serde_json::json!(f),
            toml::Value::Integer(i) => serde_json::json!(i),
            other => serde_json::to_value(other).unwrap(),
        };
        assert_eq!(&ours, theirs, "{}", key.name);
    }
    assert_eq!(compared, 35);
}

#[test]
fn a_whole_config_of_trl_loads_and_nothing_is_dropped_silently() {
    let (dump, trl) = trl_dump();
    let (mut run, notes) = from(&dump, "").unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(run.training.gradient_checkpointing, GradientCheckpointing::On);
    run.training.gradient_checkpointing = GradientCheckpointing::Auto;
    assert_eq!(run, SftRun::default());
    let ours: Vec<&str> =
        run.erased().sections().iter().flat_map(|s| s.keys()).map(|k| k.name).collect();
    for key in trl.keys().filter(|k| !ours.contains(&k.as_str())) {
        assert!(
            notes.iter().any(|n| n.contains(&format!("{key} = "))),
            "{key} was dropped silently: {notes:#?}"
        );
    }
}

#[test]
fn the_command_line_overrides_the_file() {
    let (run, notes) = from(
        "max_steps = 100\nlearning_rate = 1e-4\ngradient_checkpointing = true\nwarmup_steps = 0.1\n",
        "max_steps=20 dtype=float32 max_length=none packing_strategy=bfd_split eos_token=<|end|> save_total_limit=3",
    )
    .unwrap();
    assert!(notes.is_empty(), "{notes:?}");
    assert_eq!(run.training.max_steps, 20);
    assert_eq!(run.training.learning_rate, 1e-4);
    assert_eq!(run.training.dtype, Dtype::Float32);
    assert_eq!(run.training.gradient_checkpointing, GradientCheckpointing::On);
    assert_eq!(run.training.warmup_steps, Amount::Share(0.1));
    assert_eq!(run.training.save_total_limit, Some(3));
    assert_eq!(
        (run.method.truncation.length.max_length, run.method.packing_strategy),
        (None, PackingStrategy::BfdSplit)
    );
    assert_eq!(run.method.eos_token.as_deref(), Some("<|end|>"));
}

#[test]
fn the_resolved_file_loads_back_identical() {
    for (file, overrides) in [
        ("", ""),
        ("save_strategy = \"no\"\n", ""),
        (
            "lr_scheduler_type = \"constant\"\ndtype = \"bf16\"\n",
            "seed=9223372036854775807 eval_strategy=steps eval_rows=0.05",
        ),
        (
            "packing = true\nwarmup_steps = 0.03\neos_token = \"a \\\"b\\\"\\n\"\n",
            "max_grad_norm=0 gradient_checkpointing=off",
        ),
        ("save_steps = 7\n", "save_strategy=epoch adam_epsilon=1e-300 learning_rate=0.1e-7"),
    ] {
        let overrides =
            overrides.replace("gradient_checkpointing=off", "gradient_checkpointing=false");
        let (run, _) = from(file, &overrides).unwrap_or_else(|e| panic!("{e}"));
        let text = run.erased().to_toml("temper sft --model m\n--data d");
        assert!(text.starts_with("# temper sft --model m\n# --data d\n"));
        let (again, notes) = from(&text, "").unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert!(notes.is_empty(), "{notes:?}");
        assert_eq!(again, run);
        assert_eq!(again.erased().to_toml("temper sft --model m\n--data d"), text);
        assert!(changes(&text, &again.erased().sections()).unwrap().is_empty());
    }
}

#[test]
fn all_problems_are_reported_at_once_with_their_place() {
    let file = "learning_rte = 1\nlearning_rate = -1.0\nadam_beta2 = 1.0\n\nmax_length = 0\nseed = \"x\"\n";
    let found = problems(
        file,
        "per_device_train_batch_size=0 warmup save_strategy=no save_steps=10 packing=yes top=3",
    );
    let expected = [
        "command line: \"warmup\" is not of the form key=value",
        "run.toml:1: unknown option learning_rte; did you mean learning_rate?",
        "run.toml:6: seed = \"x\": expected a whole number, not negative",
        "command line: packing = yes: expected true or false",
        "command line: unknown option top; --help-options lists the options",
        "per_device_train_batch_size = 0: must be at least 1",
        "learning_rate = -1: must not be negative",
        "adam_beta2 = 1: must be at least 0 and below 1",
        "command line: save_steps is given but has no effect: save_strategy is not \"steps\"",
        "max_length = 0: a row needs at least 2 tokens, one to predict from and one to predict",
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (line, end) in found.iter().zip(expected) {
        assert!(line.ends_with(end) || line.contains(end), "{line}\n{end}");
    }
}

#[test]
fn values_out_of_range_and_contradictions_are_found() {
    for (overrides, part) in [
        ("learning_rate=nan", "expected a number"),
        ("learning_rate=inf", "expected a number"),
        ("adam_beta1=-0.1", "adam_beta1"),
        ("adam_epsilon=-1e-8", "adam_epsilon"),
        ("weight_decay=-1", "weight_decay"),
        ("max_grad_norm=-1", "max_grad_norm"),
        ("gradient_accumulation_steps=0", "at least 1"),
        ("per_device_eval_batch_size=0", "at least 1"),
        ("per_device_train_batch_size=2.5", "expected a whole number"),
        ("per_device_train_batch_size=99999999999999999999", "expected a whole number"),
        ("max_steps=0", "or -1"),
        ("max_steps=-2", "or -1"),
        ("num_train_epochs=0", "above 0"),
        ("warmup_steps=1.5", "a whole number, or a share"),
        ("warmup_steps=-1", "a whole number, or a share"),
        ("warmup_steps=5 lr_scheduler_type=constant", "constant_with_warmup"),
        (
            "lr_scheduler_type=cosinus",
            "warmup_stable_decay, constant, constant_with_warmup; did you mean cosine?",
        ),
        ("logging_steps=0", "at least 1"),
        ("save_steps=0", "save_strategy"),
        ("save_total_limit=0", "keeps all"),
        ("eval_steps=5", "eval_strategy"),
        ("eval_rows=5", "eval_strategy"),
        ("max_length=1", "2 tokens"),
        ("packing=true max_length=none", "packing = true needs max_length"),
        ("packing=true truncation_mode=keep_end", "packing cuts from the end"),
        ("packing=true packing_strategy=wrapped on_truncation=drop", "never drops"),
        ("max_length=none on_truncation=drop", "max_length is"),
        ("optim=adamw_bf16 dtype=float32", "adamw_bf16"),
        ("optim=sgd", "one of adamw, adamw_bf16"),
        ("dtype=float16", "one of auto, float32, bfloat16"),
        ("loss_type=dft", "one of nll"),
        ("learning-rte=1e-4", "did you mean learning_rate?"),
        ("label_smoothing_factor=0.1", "label smoothing is not supported"),
        ("neftune_noise_alpha=5", "NEFTune"),
        ("data_seed=7", "seed"),
        ("bf16=true dtype=float32", "bf16 = true means dtype"),
        ("warmup_ratio=2.5", "expected a whole number, or a share"),
    ] {
        let found = problems("", overrides);
        assert!(found.len() == 1 && found[0].contains(part), "{overrides}: {found:#?}");
    }
}

#[test]
fn keys_of_transformers_are_understood_or_named() {
    let file = "bf16 = true\nreport_to = [\"wandb\"]\nrun_name = \"x\"\nuse_liger_kernel = true\nwarmup_ratio = 0.1\n\
                use_cpu = false\noptim = \"adamw_torch_fused\"\nneftune_noise_alpha = \"none\"\n";
    let (run, notes) = from(file, "dataloader_num_workers=4").unwrap();
    assert_eq!(run.training.dtype, Dtype::Bfloat16);
    assert_eq!(run.training.warmup_steps, Amount::Share(0.1));
    for part in [
        "dtype = \"bfloat16\" (bf16 = true)",
        "report_to = wandb has no effect",
        "run_name = \"x\"",
        "use_liger_kernel",
    ] {
        assert!(notes.iter().any(|n| n.contains(part)), "{part}: {notes:#?}");
    }
    assert!(notes.iter().any(|n| n.contains("dataloader_num_workers = 4")));
    let (run, notes) = from(file, "dtype=float32").unwrap();
    assert_eq!(run.training.dtype, Dtype::Float32);
    assert!(
        notes
            .iter()
            .any(|n| n.contains("bf16 = true has no effect: dtype = \"float32\" (command line)")),
        "{notes:#?}"
    );
    let (run, _) = from("dtype = \"float32\"\n", "bf16=true").unwrap();
    assert_eq!(run.training.dtype, Dtype::Bfloat16);
}

#[test]
fn the_command_line_may_switch_off_what_the_file_sets() {
    let (run, notes) = from("save_steps = 7\nsave_total_limit = 2\n", "save_strategy=no").unwrap();
    assert_eq!(
        (run.training.save_strategy, run.training.save_steps),
        (When::No, Amount::Count(500))
    );
    assert_eq!(run.training.save_total_limit, None);
    assert_eq!(notes.len(), 2, "{notes:?}");
}

#[test]
fn a_file_that_is_no_run_file_says_so() {
    assert!(problems("learning_rate 1\n", "")[0].contains("run.toml"));
    assert!(problems("[training]\nlearning_rate = 1.0\n", "")[0].contains("no tables"));
    assert!(problems("a.b = 1\n", "")[0].contains("no tables"));
    let dir = tempfile::tempdir().unwrap();
    let yaml = dir.path().join("run.yaml");
    std::fs::write(&yaml, "- learning_rate\n").unwrap();
    assert!(SftRun::load(Some(&yaml), &[]).unwrap_err().to_string().contains("run.yaml"));
    std::fs::write(&yaml, b"a = \"\xff\"").unwrap();
    assert!(SftRun::load(Some(&yaml), &[]).unwrap_err().to_string().contains("UTF-8"));
    let missing = SftRun::load(Some(&PathBuf::from("/no/such/run.toml")), &[]).unwrap_err();
    assert!(missing.to_string().starts_with("/no/such/run.toml"), "{missing}");
}

#[test]
fn mutated_run_files_never_panic() {
    let (dump, _) = trl_dump();
    let text = dump + &SftRun::default().erased().to_toml("");
    let lines: Vec<&str> = text.lines().collect();
    let mut state = 1u32;
    let mut next = |n: usize| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as usize % n
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    let (mut good, mut bad) = (0, 0);
    for _ in 0..1000 {
        let mut bytes: Vec<u8> = (0..1 + next(4))
            .map(|_| format!("{}\n", lines[next(lines.len())]))
            .collect::<String>()
            .into();
        for _ in 0..next(3) {
            let at = next(bytes.len());
            bytes[at] = next(128) as u8;
        }
        std::fs::write(&path, &bytes).unwrap();
        match SftRun::load(Some(&path), &[]) {
            Ok(_) => good += 1,
            Err(e) => {
                assert_eq!(e.exit_code(), 2, "{e}");
                bad += 1;
            }
        }
    }
    assert!(good > 50 && bad > 50, "{good} {bad}");
}

#[test]
fn a_resumed_run_may_not_become_another_run() {
    let (run, _) = SftRun::load(None, &words("max_steps=20")).unwrap();
    let old = run.erased().to_toml("");
    let (new, _) =
        SftRun::load(None, &words("max_steps=30 save_steps=5 dtype=float32 logging_steps=1"))
            .unwrap();
    assert_eq!(
        changes(&old, &new.erased().sections()).unwrap(),
        ["max_steps: was 20, is now 30", "dtype: was \"auto\", is now \"float32\""]
    );
}

#[test]
fn amounts_round_as_transformers_does() {
    assert_eq!(Amount::Share(0.1).of(101), 11);
    assert_eq!(Amount::Count(7).of(3), 7);
    let training = TrainingConfig { num_train_epochs: 1.5, ..Default::default() };
    assert_eq!(training.total_steps(3), 5);
    assert_eq!(TrainingConfig { max_steps: 4, ..training }.total_steps(3), 4);
}

#[test]
fn generation_keys_have_their_own_section() {
    let mut keys = GenerateConfig::default();
    let notes =
        load(&mut [&mut keys], None, &words("temperature=0.7 top_p=0.9 max_new_tokens=5")).unwrap();
    assert!(notes.is_empty());
    assert_eq!(
        (keys.sampling.temperature, keys.sampling.top_p, keys.max_new_tokens),
        (0.7, 0.9, 5)
    );
    for bad in [
        "temperature=-1",
        "top_p=0",
        "top_p=1.1",
        "min_p=2",
        "temperature=0 top_k=5",
        "max_new_tokens=0",
    ] {
        let mut keys = GenerateConfig::default();
        assert_eq!(load(&mut [&mut keys], None, &words(bad)).unwrap_err().exit_code(), 2, "{bad}");
    }
    let mut keys = GenerateConfig::default();
    load(&mut [&mut keys], None, &words("do_sample=false")).unwrap();
    assert_eq!(keys.sampling.temperature, 0.0);
}

#[test]
fn every_key_has_a_doc_and_one_owner() {
    let run = SftRun::default();
    let keys: Vec<_> = run.erased().sections().iter().flat_map(|s| s.keys()).collect();
    let mut names: Vec<_> = keys.iter().map(|k| k.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), keys.len());
    assert!(keys.iter().all(|k| k.doc.len() > 15 && k.doc.ends_with('.')));
    let text = help(&run.erased().sections());
    assert!(
        text.contains("max_length = 1024    (integer or none)\n    Longest row in tokens"),
        "{text}"
    );
    assert!(markdown(&run.training.keys()).contains("| `seed` | integer | `42` |"));
}
