//! The memory plan of online methods against the high-water mark of the run's pool, and the number
//! of sequences that it allows.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::json;
use temper::Training;
use temper::autograd::Cx;
use temper::checkpoint::prepare_output;
use temper::data::rows::read_rows;
use temper::device::DType;
use temper::methods::online::gkd::GkdConfig;
use temper::methods::online::grpo::GrpoConfig;
use temper::methods::online::on_policy_distill::OnPolicyDistillConfig;
use temper::methods::online::online_dpo::OnlineDpoConfig;
use temper::methods::online::ppo::PpoConfig;
use temper::methods::online::reinforce::ReinforceConfig;
use temper::methods::online::rloo::RlooConfig;
use temper::methods::{BuildMethod, BuiltMethod, Method, MethodRun};
use temper::observer::Observer;
use temper::rewards::RewardFunction;
use temper::signals::Stop;
use temper::train::job::{Job, JobRows, execute};
use temper::train::plan::{PlanRequest, fit};
use temper::train::rows::RunRows;

use crate::support::{MODEL, cpu_in, rows, with_inputs, words, write_rows};

pub const REWARD: &str = "reward_funcs=regex:^[a-z]";

/// Hears what a run says.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<String>>);

impl Observer for Heard {
    fn info(&self, text: &str) {
        self.0.lock().unwrap().push_str(text);
    }
}

/// Eight prompts of nearly one length: whichever a step takes, it is no smaller than the plan's.
fn prompts(dir: &Path) -> PathBuf {
    let row = |i: usize| {
        json!({
            "prompt": format!("Ana had 21 stones and lost {i}. How many are left?\n"),
            "completion": format!("21 - {i} = {}. The answer is {}.", 21 - i, 21 - i),
        })
    };
    write_rows(dir.join("prompts.jsonl"), &(1..9).map(row).collect::<Vec<_>>()).into()
}

pub struct Ran {
    pub planned: usize,
    pub measured: usize,
    pub said: String,
}

/// Two steps of a method; its completions reach their limit (the fixture's model seldom ends one).
pub fn run<M: BuildMethod + Default + 'static>(keys: &str, dtype: DType) -> Ran {
    let common = "per_device_train_batch_size=8 gradient_accumulation_steps=1 max_steps=2 \
                  save_strategy=no learning_rate=1e-6";
    let keys = [words(common), words(keys)].concat();
    let rewards = if M::default().name() == "online-dpo" { vec![differing()] } else { vec![] };
    let mut run = MethodRun::<M>::default();
    let options: &mut MethodRun = &mut run;
    options.read(None, &keys, rewards.len()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let rows = read_rows(&[prompts(dir.path())]).unwrap();
    let folder = prepare_output(dir.path().join("out"), false, false).unwrap();
    let job = Job {
        run: &run,
        model: Path::new(MODEL),
        adapter: None,
        fresh: false,
        rows: JobRows::Given(&RunRows { train: rows, ..Default::default() }),
        rewards: &rewards,
        folder: &folder,
        command: "test",
        stop: Stop::default(),
    };
    let heard = Heard::default();
    let mut cx: Cx = cpu_in(dtype);
    cx.observer = Arc::new(heard.clone());
    let done = execute(cx, &job).unwrap();
    let said = heard.0.lock().unwrap().clone();
    Ran { planned: done.planned, measured: done.cx.pool.in_use().1, said }
}

/// No two completions are equally good, so that no pair is dropped, as in the plan.
fn differing() -> RewardFunction {
    RewardFunction::new("differing", |row| {
        Some(row.ids().iter().fold(0.5, |x: f64, id| (x * 31.0 + f64::from(*id)) % 1009.7))
    })
}

/// A reward model on the fixture's model.
pub fn reward_model(dir: &Path) -> String {
    let pair = |i: usize| json!({ "prompt": "a", "chosen": format!("b {i}"), "rejected": "c" });
    let data = write_rows(dir.join("pairs.jsonl"), &(0..4).map(pair).collect::<Vec<_>>());
    let out = dir.join("reward");
    Training::new("reward")
        .unwrap()
        .options(words("max_steps=1 per_device_train_batch_size=2 device=cpu"))
        .model(MODEL)
        .data([data])
        .output(&out)
        .observer(Heard::default())
        .run()
        .unwrap();
    out.display().to_string()
}

#[test]
fn the_plan_of_every_online_method_is_within_five_per_cent() {
    let dir = tempfile::tempdir().unwrap();
    let reward = format!("reward_model={}", reward_model(dir.path()));
    let teacher = format!("teacher_model_name_or_path={MODEL}");
    let lora = "use_peft=true lora_target_modules=all-linear lora_dropout=0";
    let (length, tokens) = ("max_completion_length=24", "max_new_tokens=24");
    let f32 = DType::F32;
    let group = format!("{length} num_generations=4 gradient_accumulation_steps=2");
    let all: Vec<(String, Ran)> = {
        let mut all = Vec::new();
        let mut add = |name: &str, ran: Ran| all.push((name.to_string(), ran));
        let grpo = |keys: &str| run::<GrpoConfig>(&format!("{group} {keys}"), f32);
        add("grpo", grpo(REWARD));
        add("grpo bf16", run::<GrpoConfig>(&format!("{group} {REWARD}"), DType::BF16));
        add("grpo beta", grpo(&format!("{REWARD} beta=0.1")));
        add("grpo recompute", grpo(&format!("{REWARD} gradient_checkpointing=true")));
        add("grpo 4 sequences", grpo(&format!("{REWARD} max_sequences=4")));
        add("grpo two steps a generation", grpo(&format!("{REWARD} steps_per_generation=4")));
        // So many completions that the reward model takes what it takes at most, whatever its
        // tokenizer makes of them.
        let many = format!("{length} num_generations=32 gradient_accumulation_steps=32 {reward}");
        add("grpo reward model", run::<GrpoConfig>(&many, f32));
        add("grpo lora beta", grpo(&format!("{REWARD} {lora} beta=0.1")));
        add("grpo pissa beta", grpo(&format!("{REWARD} {lora} init_lora_weights=pissa beta=0.1")));
        let codes = "load_in_4bit=true use_bnb_nested_quant=true";
        add("grpo qlora beta", grpo(&format!("{REWARD} {lora} {codes} beta=0.1")));
        add("grpo int8", grpo(&format!("{REWARD} {lora} load_in_8bit=true")));
        add("grpo prompt tuning", grpo(&format!("{REWARD} use_peft=true peft_type=PROMPT_TUNING")));
        add("rloo", run::<RlooConfig>(&format!("{group} {REWARD}"), f32));
        add("reinforce", run::<ReinforceConfig>(&format!("{group} {REWARD}"), f32));
        let greedy = format!("{length} num_generations=1 greedy_baseline=true {REWARD}");
        add("remax", run::<ReinforceConfig>(&greedy, f32));
        let ppo = |keys: &str| run::<PpoConfig>(&format!("{length} {keys}"), f32);
        add("ppo", ppo(REWARD));
        add("ppo shared", ppo(&format!("{REWARD} value_model=shared")));
        add("ppo reward model", ppo(&reward));
        add("online dpo", run::<OnlineDpoConfig>(tokens, f32));
        let gkd = |keys: &str| run::<GkdConfig>(&format!("{tokens} {teacher} {keys}"), f32);
        add("gkd", gkd("lmbda=1"));
        add("gkd of the data", gkd("lmbda=0"));
        add("gkd of the teacher", gkd("lmbda=0 seq_kd=true"));
        let distill = format!("{length} {teacher}");
        add("on-policy distillation", run::<OnPolicyDistillConfig>(&distill, f32));
        all
    };
    let mut report = String::new();
    let mut worst = 0f64;
    for (name, ran) in &all {
        let off = ran.planned as f64 / ran.measured as f64 - 1.0;
        report +=
            &format!("{name:<30} planned {}, measured {}: {off:+.4}\n", ran.planned, ran.measured);
        worst = worst.max(off.abs());
    }
    println!("{report}");
    assert!(worst <= 0.05, "{report}");
    // What a run holds has a line of its own, and the run says how many sequences there are.
    let said = |name: &str| &all.iter().find(|(n, _)| n == name).unwrap().1.said;
    assert!(said("grpo").contains("sequences generated at once: 16"), "{}", said("grpo"));
    for (name, parts) in [
        ("grpo beta", &["cache of keys and values", "reference"][..]),
        ("ppo reward model", &["reward model", "value model"]),
    ] {
        for part in parts {
            assert!(said(name).contains(part), "no {part} in {}", said(name));
        }
    }
}

#[test]
fn the_cache_takes_what_is_left() {
    let keys = format!(
        "{REWARD} per_device_train_batch_size=8 gradient_accumulation_steps=48 num_generations=8 \
         max_completion_length=200 gradient_checkpointing=false"
    );
    let (run, _) = MethodRun::<GrpoConfig>::load(None, &words(&keys)).unwrap();
    let config = temper::model::folder::load_config(Path::new(MODEL)).unwrap();
    let data = rows("sft/prompt_completion.jsonl");
    with_inputs(&config, &data, |inputs| {
        let build = |training: &_| -> temper::Result<Box<dyn Method>> {
            let BuiltMethod { method, .. } = run.method.build(training, inputs)?;
            Ok(method)
        };
        let method = build(&run.training).unwrap();
        assert_eq!(method.planned_sequences(), Some(384), "a generation's completions");
        let ask = PlanRequest {
            model: &config,
            dir: Path::new(MODEL),
            adapter: None,
            peft: run.peft.clone(),
            training: run.training.clone(),
            length: method.longest(),
            tokens: 8 * method.longest(),
            reference: false,
            online: Some(&build),
            sequences: method.planned_sequences(),
            samples: None,
        };
        let cx = cpu_in(DType::F32);
        let fitted = |available| fit(&cx, &ask, available).unwrap();
        let all = fitted(1 << 40);
        assert_eq!(all.sequences, Some(384), "with room for all, all");
        let cache = |plan: &temper::train::plan::Plan| {
            plan.blocks.iter().find(|b| b.0 == "kv cache").unwrap().1
        };
        // Room for some: the more there is, the more sequences, and a tenth is kept.
        let mut last = 0;
        for share in [0.5, 0.65, 0.8, 1.0] {
            let available = (all.peak as f64 * share) as usize;
            let plan = fitted(available);
            let n = plan.sequences.unwrap();
            assert!(plan.peak <= available, "{share}: {} of {available}", plan.peak);
            assert!(n > last && n < 384, "{share}: {n} sequences after {last}");
            assert_eq!(cache(&plan) * 384, cache(&all) * n, "the cache is theirs");
            last = n;
        }
        // Below one sequence there is a refusal, which says what would help.
        let error = fit(&cx, &ask, 100_000).unwrap_err().to_string();
        assert!(error.contains("sequences generated at once: 1,"), "{error}");
        assert!(error.contains("does not fit"), "{error}");
    });
}
