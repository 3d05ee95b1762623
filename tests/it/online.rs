//! Online RL end to end: exactness of the ratio, resuming, failing rewards, and each method with a
//! simple reward.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use temper::checkpoint::prepare_output;
use temper::data::rows::read_rows;
use temper::device::DType;
use temper::error::Result;
use temper::methods::offline::sft::SftConfig;
use temper::methods::online::gkd::GkdConfig;
use temper::methods::online::grpo::GrpoConfig;
use temper::methods::online::on_policy_distill::OnPolicyDistillConfig;
use temper::methods::online::online_dpo::OnlineDpoConfig;
use temper::methods::online::ppo::PpoConfig;
use temper::methods::online::reinforce::ReinforceConfig;
use temper::methods::online::rloo::RlooConfig;
use temper::methods::{BuildMethod, MethodRun};
use temper::signals::Stop;
use temper::train::job::{Job, JobRows, execute};
use temper::train::rows::RunRows;

use crate::support::{MODEL, cpu_in, fixture, json_lines, metrics, write_rows};

/// Prompts of the SFT fixture, with an answer column.
fn prompts(dir: &Path) -> PathBuf {
    let rows = json_lines(fixture("sft/prompt_completion.jsonl"));
    let with_answer = |row: &Value| json!({ "prompt": row["prompt"], "completion": row["completion"], "answer": "a" });
    let rows: Vec<Value> = rows.iter().map(with_answer).collect();
    write_rows(dir.join("prompts.jsonl"), &rows).into()
}

/// Runs a method on the fixture's model into `out`; with `resume`, continues the run in that folder.
fn run<M: BuildMethod + Default + 'static>(
    out: &Path,
    keys: &[&str],
    resume: bool,
    dtype: DType,
) -> Result<Vec<Value>> {
    let common = [
        "per_device_train_batch_size=4",
        "gradient_accumulation_steps=2",
        "learning_rate=1e-3",
        "logging_steps=1",
        "max_steps=6",
        "save_steps=3",
    ];
    let length = match M::default().name() {
        "online-dpo" | "gkd" => "max_new_tokens=12",
        "sft" => "max_length=64",
        _ => "max_completion_length=12",
    };
    let keys: Vec<String> =
        common.iter().chain(&[length]).chain(keys).map(|k| k.to_string()).collect();
    let (run, _) = MethodRun::<M>::load(None, &keys)?;
    let dir = tempfile::tempdir().unwrap();
    let rows = read_rows(&[prompts(dir.path())])?;
    let folder = prepare_output(out, false, resume)?;
    let job = Job {
        run: &run,
        model: Path::new(MODEL),
        adapter: None,
        fresh: false,
        rows: JobRows::Given(&RunRows { train: rows, ..Default::default() }),
        rewards: &[],
        folder: &folder,
        command: "test",
        stop: Stop::default(),
    };
    execute(cpu_in(dtype), &job)?;
    drop(folder);
    Ok(metrics(out))
}

/// The student's own weights: at the first step there is nothing to learn.
const TEACHER: &str = "teacher_model_name_or_path=tests/fixtures/sft/model";

const LETTERS: &str = "reward_funcs=regex:^[a-z ]";

#[test]
fn the_first_ratio_is_exactly_one_and_later_ones_are_not() {
    for dtype in [DType::F32, DType::BF16] {
        let dir = tempfile::tempdir().unwrap();
        let keys = [
            LETTERS,
            "num_generations=4",
            "num_iterations=2",
            "temperature=0.8",
            "steps_per_generation=2",
        ];
        let log = run::<GrpoConfig>(&dir.path().join("out"), &keys, false, dtype).unwrap();
        let off = |i: usize| log[i]["sampling/ratio_off_one_max"].as_f64().unwrap();
        // A generation serves two steps: the second has moved.
        for i in [0, 2, 4] {
            assert_eq!(off(i), 0.0, "{dtype:?} step {i}: {:?}", log[i]);
        }
        assert!([1, 3, 5].iter().any(|i| off(*i) > 0.0), "{dtype:?}: no later ratio moved");
    }
}

/// A run of six steps, and one that goes on from its third: the final folders have the same bytes.
fn resumes<M: BuildMethod + Default + 'static>(name: &str, keys: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let (whole, part) = (dir.path().join("whole"), dir.path().join("part"));
    let log = run::<M>(&whole, keys, false, DType::F32).unwrap();
    assert_eq!(log.len(), 6, "{name}");
    std::fs::create_dir(&part).unwrap();
    for file in ["config.toml", "metrics.jsonl", "completions.jsonl"] {
        std::fs::copy(whole.join(file), part.join(file)).unwrap();
    }
    std::fs::create_dir(part.join("checkpoint-3")).unwrap();
    for file in std::fs::read_dir(whole.join("checkpoint-3")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), part.join("checkpoint-3").join(file.file_name())).unwrap();
    }
    run::<M>(&part, keys, true, DType::F32).unwrap();
    for file in ["model.safetensors", "completions.jsonl"] {
        let (a, b) =
            (std::fs::read(whole.join(file)).unwrap(), std::fs::read(part.join(file)).unwrap());
        assert!(a == b, "{name}: {file} differs after a resume");
    }
}

#[test]
fn online_runs_resumed_equal_uninterrupted_ones_also_within_a_generation() {
    // A generation serves two steps, so step 3 is in the middle of one.
    resumes::<GrpoConfig>("grpo", &[LETTERS, "num_generations=4", "num_iterations=2", "beta=0.1"]);
    resumes::<GrpoConfig>(
        "grpo with a moving reference",
        &[
            LETTERS,
            "num_generations=2",
            "beta=0.1",
            "sync_ref_model=true",
            "ref_model_sync_steps=2",
        ],
    );
    resumes::<PpoConfig>(
        "ppo",
        &[LETTERS, "num_ppo_epochs=2", "num_mini_batches=1", "temperature=1"],
    );
    resumes::<PpoConfig>(
        "ppo, shared trunk",
        &[LETTERS, "num_ppo_epochs=2", "value_model=shared", "target_kl=0.5"],
    );
    resumes::<RlooConfig>("rloo", &[LETTERS, "num_generations=2"]);
    resumes::<ReinforceConfig>("reinforce++", &[LETTERS, "num_generations=2", "beta=0.01"]);
    resumes::<OnlineDpoConfig>("online dpo", &[LETTERS]);
    resumes::<GkdConfig>("gkd", &[TEACHER]);
    resumes::<OnPolicyDistillConfig>("on-policy distillation", &[TEACHER]);
}

#[test]
fn every_method_raises_a_plain_reward() {
    fn gain<M: BuildMethod + Default + 'static>(name: &str, keys: &[&str]) {
        let dir = tempfile::tempdir().unwrap();
        let mut all =
            vec![LETTERS, "learning_rate=1e-2", "temperature=1", "save_steps=1000", "max_steps=60"];
        all.extend(keys);
        let log = run::<M>(&dir.path().join("out"), &all, false, DType::F32).unwrap();
        let reward = |lines: &[Value]| {
            let values: Vec<f64> = lines.iter().filter_map(|l| l["reward"].as_f64()).collect();
            values.iter().sum::<f64>() / values.len() as f64
        };
        let (first, last) = (reward(&log[..5]), reward(&log[log.len() - 8..]));
        println!("{name}: {first:.2} -> {last:.2}");
        assert!(last > first + 0.25, "{name}: {first:.2} -> {last:.2}");
    }
    gain::<GrpoConfig>("grpo", &["num_generations=8"]);
    gain::<GrpoConfig>("grpo, dynamic sampling", &["num_generations=4", "dynamic_sampling=2"]);
    gain::<RlooConfig>("rloo", &["num_generations=4"]);
    gain::<ReinforceConfig>("reinforce++", &["num_generations=2"]);
    gain::<ReinforceConfig>("remax", &["num_generations=1", "greedy_baseline=true"]);
    gain::<OnlineDpoConfig>("online dpo", &["gradient_accumulation_steps=4"]);
    gain::<OnlineDpoConfig>("online dpo, ipo", &["gradient_accumulation_steps=4", "loss_type=ipo"]);
    gain::<PpoConfig>("ppo", &["num_ppo_epochs=2", "kl_coef=0.01", "max_steps=120"]);
    gain::<PpoConfig>(
        "ppo, shared trunk",
        &["num_ppo_epochs=2", "kl_coef=0.01", "value_model=shared", "max_steps=120"],
    );
}

#[test]
fn a_generation_serves_the_steps_that_its_keys_say() {
    // Per TRL: per_device_train_batch_size x steps_per_generation completions, steps_per_generation
    // x num_iterations micro-batches; two micro-batches are a step here.
    for (keys, completions, steps) in [
        (["steps_per_generation=2", "num_iterations=1"], 8, 1),
        (["steps_per_generation=2", "num_iterations=2"], 8, 2),
        (["steps_per_generation=4", "num_iterations=1"], 16, 2),
        (["steps_per_generation=4", "num_iterations=3"], 16, 6),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let all = [&[LETTERS, "num_generations=4"][..], &keys].concat();
        let log = run::<GrpoConfig>(&dir.path().join("out"), &all, false, DType::F32).unwrap();
        let made: Vec<usize> = (0..log.len())
            .filter(|i| log[*i]["reward"].is_f64() || log[*i]["reward"].is_i64())
            .collect();
        assert_eq!(made, (0..6).step_by(steps).collect::<Vec<_>>(), "{keys:?}");
        let text = std::fs::read_to_string(dir.path().join("out/completions.jsonl")).unwrap();
        let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), made.len() * completions, "{keys:?}");
        for group in lines.chunks(4) {
            assert!(group.iter().all(|l| l["prompt"] == group[0]["prompt"]), "{keys:?}");
            let sum: f64 = group.iter().map(|l| l["advantage"].as_f64().unwrap()).sum();
            assert!(
                sum.abs() < 1e-9,
                "advantages of a group add up to rounding of 4 doubles: {sum}"
            );
        }
    }
}

#[test]
fn masks_dynamic_sampling_and_a_moving_reference_do_what_they_say() {
    let grpo = |keys: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        let all = [&[LETTERS, "num_generations=4"][..], keys].concat();
        run::<GrpoConfig>(&dir.path().join("out"), &all, false, DType::F32).unwrap()
    };
    let of = |log: &[Value], name: &str| {
        log.iter().map(|l| l[name].as_f64().unwrap()).collect::<Vec<_>>()
    };
    // Three tokens: next to nothing ends, so next to nothing is learnt.
    let masked = grpo(&["mask_truncated_completions=true", "max_completion_length=3"]);
    let (cut, norms) = (of(&masked, "completions/clipped_ratio"), of(&masked, "grad_norm"));
    assert!(cut.contains(&1.0), "{cut:?}");
    assert!(cut.iter().zip(&norms).all(|(c, n)| *c < 1.0 || *n == 0.0), "{cut:?} {norms:?}");
    assert!(of(&grpo(&["max_completion_length=3"]), "grad_norm").iter().any(|n| *n > 0.0));
    let flat = |keys: &[&str]| of(&grpo(keys), "frac_reward_zero_std").iter().sum::<f64>();
    let (plain, dynamic) = (flat(&[]), flat(&["dynamic_sampling=3"]));
    assert!(dynamic < plain, "{dynamic} is not below {plain}");
    // A reference that becomes the policy after each step is never left.
    let sync =
        ["beta=0.1", "sync_ref_model=true", "ref_model_mixup_alpha=1", "ref_model_sync_steps=1"];
    assert!(of(&grpo(&sync), "kl").iter().all(|k| *k == 0.0));
    assert!(of(&grpo(&sync[..1]), "kl").iter().any(|k| *k > 0.0));
}

#[test]
fn online_dpo_starts_at_its_reference_and_drops_ties() {
    let dir = tempfile::tempdir().unwrap();
    let log =
        run::<OnlineDpoConfig>(&dir.path().join("out"), &[LETTERS], false, DType::F32).unwrap();
    let value = |i: usize, name: &str| {
        log[i][name].as_f64().unwrap_or_else(|| panic!("{name}: {:?}", log[i]))
    };
    assert!(value(0, "ties_dropped") < 8.0, "the first step has a pair");
    assert_eq!(value(0, "loss") as f32, std::f32::consts::LN_2);
    for name in ["rewards/margins", "objective/kl", "rewards/chosen"] {
        assert_eq!(value(0, name), 0.0, "{name}");
    }
    assert!((1..6).any(|i| value(i, "objective/kl") != 0.0), "the policy has moved");
    // Completions that do not end lose: with a reward that never differs, the penalty alone makes
    // pairs.
    let flat = ["reward_funcs=length:max=99", "max_steps=1"];
    let tied = run::<OnlineDpoConfig>(&dir.path().join("tied"), &flat, false, DType::F32).unwrap();
    assert_eq!(tied[0]["ties_dropped"].as_f64(), Some(8.0));
    assert_eq!((tied[0]["loss"].as_f64(), tied[0]["grad_norm"].as_f64()), (Some(0.0), Some(0.0)));
    let keys = [
        flat[0],
        flat[1],
        "missing_eos_penalty=1",
        "gradient_accumulation_steps=12",
        "max_new_tokens=60",
    ];
    let penalised =
        run::<OnlineDpoConfig>(&dir.path().join("eos"), &keys, false, DType::F32).unwrap();
    let text = std::fs::read_to_string(dir.path().join("eos/completions.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let mut pairs = 0;
    for pair in lines.chunks(2) {
        let ended = |i: usize| pair[i]["finished"] == true;
        let place = |i: usize| pair[i]["advantage"].as_f64().unwrap();
        let wanted = f64::from(i8::from(ended(0)) - i8::from(ended(1)));
        assert_eq!((place(0), place(1)), (wanted, -wanted), "{pair:?}");
        pairs += usize::from(wanted != 0.0);
    }
    assert!(pairs > 0, "no pair of an ended and a cut completion");
    assert_eq!(penalised[0]["ties_dropped"].as_f64(), Some((lines.len() / 2 - pairs) as f64));
}

#[test]
fn gkd_draws_the_student_towards_its_teacher() {
    let dir = tempfile::tempdir().unwrap();
    let teacher = dir.path().join("teacher");
    let keys = ["learning_rate=5e-3", "max_steps=40", "save_steps=1000"];
    run::<SftConfig>(&teacher, &keys, false, DType::F32).unwrap();
    let named = format!("teacher_model_name_or_path={}", teacher.display());
    let gkd = |name: &str, keys: &[&str]| {
        let all: Vec<&str> =
            [named.as_str(), "learning_rate=5e-3", "max_steps=40", "save_steps=1000"]
                .into_iter()
                .chain(keys.iter().copied())
                .collect();
        run::<GkdConfig>(&dir.path().join(name), &all, false, DType::F32).unwrap()
    };
    let mean = |log: &[Value]| {
        log.iter().map(|l| l["loss"].as_f64().unwrap()).sum::<f64>() / log.len() as f64
    };
    for (name, keys) in [
        ("reverse KL, the student's rows", &["lmbda=1", "beta=1"][..]),
        ("JSD, the data's rows", &["lmbda=0"]),
        ("forward KL, the teacher's rows", &["lmbda=0", "beta=0", "seq_kd=true"]),
    ] {
        let log = gkd(name, keys);
        let (first, last) = (mean(&log[..3]), mean(&log[log.len() - 5..]));
        println!("{name}: {first:.4} -> {last:.4}");
        assert!(last < 0.5 * first, "{name}: {first} -> {last}");
        let share = if name.contains("student") { 1.0 } else { 0.0 };
        assert!(log.iter().all(|l| l["on_policy"].as_f64() == Some(share)), "{name}");
    }
    // At lmbda 0.5 the draws go both ways.
    let log = gkd("mixed", &["max_steps=12"]);
    let share =
        log.iter().map(|l| l["on_policy"].as_f64().unwrap()).sum::<f64>() / log.len() as f64;
    assert!((0.2..0.8).contains(&share), "{share}");
    // A teacher that is the student: nothing to learn, exactly.
    let same = run::<GkdConfig>(
        &dir.path().join("same"),
        &[TEACHER, "lmbda=1", "max_steps=1"],
        false,
        DType::F32,
    );
    assert!(
        same.unwrap()[0]["loss"].as_f64().unwrap().abs() < 1e-6,
        "rounding of a difference of equal numbers"
    );
}

#[test]
fn on_policy_distillation_is_gkd_of_the_students_rows() {
    let dir = tempfile::tempdir().unwrap();
    let teacher = dir.path().join("teacher");
    let keys = ["learning_rate=5e-3", "max_steps=20", "save_steps=1000"];
    run::<SftConfig>(&teacher, &keys, false, DType::F32).unwrap();
    let named = format!("teacher_model_name_or_path={}", teacher.display());
    let common = [named.as_str(), "max_steps=10", "disable_dropout=true", "learning_rate=5e-3"];
    let with = |more: &[&'static str]| [&common[..], more].concat();
    let gkd_keys = with(&["lmbda=1", "beta=1", "temperature=1"]);
    let gkd = run::<GkdConfig>(&dir.path().join("gkd"), &gkd_keys, false, DType::F32).unwrap();
    let out = dir.path().join("on-policy");
    let ours = run::<OnPolicyDistillConfig>(&out, &with(&[]), false, DType::F32).unwrap();
    let losses = |log: &[Value]| log.iter().map(|l| l["loss"].clone()).collect::<Vec<_>>();
    assert_eq!(losses(&ours), losses(&gkd));
    // At another temperature the loss is softened, too, so the two part.
    let (warm, softer) = (with(&["temperature=1.5"]), dir.path().join("softer"));
    let softer = run::<OnPolicyDistillConfig>(&softer, &warm, false, DType::F32).unwrap();
    assert_ne!(losses(&softer), losses(&ours));
    let (first, last) = (&ours[0]["loss"], &ours[9]["loss"]);
    assert!(last.as_f64() < first.as_f64(), "{first} -> {last}");
}

fn refused<M: BuildMethod + Default + 'static>(keys: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    match run::<M>(&dir.path().join("out"), keys, false, DType::F32) {
        Ok(_) => "accepted".into(),
        Err(e) => e.to_string(),
    }
}

#[test]
fn what_cannot_be_right_is_refused_with_the_next_step() {
    for (said, text) in [
        ("no reward", refused::<GrpoConfig>(&[])),
        ("does not divide", refused::<GrpoConfig>(&[LETTERS, "num_generations=3"])),
        (
            "set lora_dropout=0",
            refused::<GrpoConfig>(&[LETTERS, "use_peft=true", "num_generations=4"]),
        ),
        ("at least 2", refused::<RlooConfig>(&[LETTERS, "num_generations=1"])),
        ("is not a reward model", refused::<PpoConfig>(&["reward_model=tests/fixtures/sft/model"])),
        ("give the teacher's folder", refused::<GkdConfig>(&[])),
        ("no reward", refused::<OnlineDpoConfig>(&[])),
        ("beta: one number above 0", refused::<OnlineDpoConfig>(&[LETTERS, "beta=0"])),
        (
            "importance_sampling_level=sequence",
            refused::<GrpoConfig>(&[LETTERS, "loss_type=luspo"]),
        ),
    ] {
        assert!(text.contains(said), "{said}: {text}");
    }
}

#[test]
fn a_reward_command_that_dies_leaves_a_checkpoint_to_go_on_from() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    // It answers the rows of the first generation and then no more.
    let script = dir.path().join("reward.sh");
    let body = "n=0\nwhile read -r line; do\n  n=$((n+1)); [ \"$n\" -gt 8 ] && exit 3\n  \
                id=$(printf '%s' \"$line\" | sed 's/.*\"id\":\\([0-9]*\\).*/\\1/')\n  \
                printf '{\"id\":%s,\"reward\":%s}\\n' \"$id\" \"$((n % 2))\"\ndone\n";
    std::fs::write(&script, body).unwrap();
    let reward = format!("reward_funcs=command:sh {}", script.display());
    let error = run::<GrpoConfig>(&out, &[&reward, "num_generations=4"], false, DType::F32)
        .unwrap_err()
        .to_string();
    let names =
        std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let saved: Vec<String> = names.filter(|n| n.starts_with("checkpoint-")).collect();
    assert!(!saved.is_empty(), "{error}");
    assert!(error.contains("row") && error.contains("reward"), "{error}");
}
