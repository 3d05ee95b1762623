# LoRA SFT as in README, "A real model": 600 rows, one epoch, rank 16 on all linear layers.
"$1" sft --model "$2" --data "$3/sft.jsonl" --output "$4" seed="$5" use_peft=true lora_target_modules=all-linear \
  learning_rate=1e-3 lr_scheduler_type=cosine num_train_epochs=1 per_device_train_batch_size=16
