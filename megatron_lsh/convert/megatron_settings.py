"""Which argument of Megatron-LM does what to a model that is read here: every name that it writes into a checkpoint's args.

A name is in exactly one of three tables. The names are those of Megatron-LM's parsers from v2.5 to core 0.19 and of its main
branch of August 2026, and what its validation adds to them. What is in no table is refused unless it is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# Settings of ours that are read from the file's args, which have Megatron-LM's names like ours.
READ = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "group_query_attention",
    "num_query_groups", "max_position_embeddings", "seq_length", "position_embedding_type", "rotary_base",
    "rotary_percent", "rotary_interleaved", "make_vocab_size_divisible_by", "normalization", "norm_epsilon", "swiglu",
    "openai_gelu", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights",
    "init_method_std", "attention_dropout", "hidden_dropout", "add_position_embedding", "num_experts", "moe_layer_freq",
    "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_router_topk",
    "moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias", "moe_router_num_groups", "moe_router_group_topk", "moe_router_load_balancing_type",
    "moe_expert_capacity_factor", "moe_token_drop_policy",
)  # fmt: skip

# How the files are cut.
CUTS = ("tensor_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size")

# What else is read: other versions' names of settings, and the vocabulary.
READ_TOO = (
    "layernorm_epsilon", "use_rotary_position_embeddings", "disable_bias_linear", "vocab_size", "encoder_num_layers",
)  # fmt: skip

_OFF = (False,)
_ABSENT = ()

# What makes another model, or another file: values under which it does not, besides None.
REQUIRED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        # the layer
        "apply_layernorm_1p": _OFF, "layernorm_zero_centered_gamma": _OFF, "squared_relu": _OFF, "quick_geglu": _OFF,
        "glu_linear_offset": (0.0,), "activation_func_clamp_value": _ABSENT, "enable_gpt_oss": _OFF,
        "apply_residual_connection_post_layernorm": _OFF, "enable_mhc_connections": _OFF, "spec": _ABSENT,
        "heterogeneous_layers_config_path": ("",), "heterogeneous_layers_config_encoded_json": ("",),
        "is_hybrid_model": _OFF, "hybrid_override_pattern": _ABSENT, "hybrid_layer_pattern": _ABSENT,
        "hybrid_attention_ratio": (0.0,), "hybrid_mlp_ratio": (0.0,), "retro_add_retriever": _OFF,
        "vision_pretraining": _OFF, "biencoder_projection_dim": (0,), "decoder_num_layers": _ABSENT,
        "use_mup": _OFF, "mup_embedding_mult": (1.0,), "mup_output_mult": (1.0,), "mup_width_mult": (1.0,),
        "mtp_num_layers": (0,), "export_num_mtp": (0,), "export_num_medusa_heads": (0,), "export_num_eagle_layers": (0,),
        # attention and positions
        "multi_latent_attention": _OFF, "experimental_attention_variant": _ABSENT, "linear_attention_freq": _ABSENT,
        "attention_output_gate": _OFF, "qk_l2_norm": _OFF, "export_qk_l2_norm": _OFF, "softmax_type": ("vanilla",),
        "softmax_scale": _ABSENT, "window_size": _ABSENT, "window_attn_skip_freq": _ABSENT, "no_rope_freq": _ABSENT,
        "use_rope_scaling": _OFF, "rotary_seq_len_interpolation_factor": (1,), "mrope_section": _ABSENT,
        # mixture of experts
        "moe_latent_size": _ABSENT, "moe_apply_probs_on_input": _OFF, "export_moe_apply_probs_on_input": _OFF,
        "moe_router_topk_limited_devices": _ABSENT, "moe_router_force_load_balancing": _OFF,
        "moe_router_force_biased": _ABSENT, "moe_expert_rank_capacity_factor": _ABSENT,
        # what is in the files
        "modelopt_enabled": _OFF, "export_quant_cfg": ("None",), "export_real_quant_cfg": ("None",),
        "ammo_quant_cfg": _ABSENT, "moe_mlp_glu_interleave_size": _ABSENT, "moe_extended_tp": _OFF,
        "moe_shared_expert_glu_interleave_size": _ABSENT, "moe_single_grouped_weight": _OFF,
        "moe_single_grouped_bias": _OFF, "pipeline_model_parallel_size": (1,),
        "transformer_pipeline_model_parallel_size": (1,), "virtual_pipeline_model_parallel_size": (1,),
        "num_layers_per_virtual_pipeline_stage": _ABSENT, "num_virtual_stages_per_pipeline_rank": (1,),
    }
)  # fmt: skip

# What changes no number of the trained model, by the reason.
_WITHOUT_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        "how it was trained: steps, batches, losses, optimizer, numbers that are summed": """
            _is_global_batch_size_explicitly_specified _latest_batch_num_sequences _sequences_this_iteration_on_rank
            adam_beta1 adam_beta2 adam_eps adlr_autoresume adlr_autoresume_interval apply_wd_to_qk_layernorm batch_size
            calculate_per_token_loss check_for_large_grads check_for_nan_in_loss_and_grad check_for_spiky_loss
            check_weight_hash_across_dp_replicas_interval clip_grad data_parallel_random_init
            dataloader_inter_document_masking decoupled_lr decoupled_min_lr decrease_batch_size_if_needed do_test
            do_train do_valid dynamic_loss_scale embedding_init_method_std empty_unused_memory_level end_weight_decay
            eod_mask_loss error_injection_rate error_injection_type eval_global_batch_size eval_interval eval_iters
            eval_micro_batch_size exit_duration_in_mins exit_interval exit_on_missing_checkpoint exit_signal
            exit_signal_handler exit_signal_handler_for_dataloader exit_signal_handler_for_training exp_avg_dtype
            exp_avg_sq_dtype export_kd_cfg export_kd_finalize export_kd_teacher_ckpt_format export_kd_teacher_load
            export_kd_teacher_model_config fault_injector_delay_start_iteration fault_injector_fault_delay
            fault_injector_fault_probabilities fault_injector_fault_types fault_injector_mtti_seconds
            fault_injector_num_ranks fault_injector_offset_seconds fault_injector_ranks fault_injector_seed fim_data
            fim_eod_token fim_fragment_rate fim_middle_token fim_no_prefix fim_pad_token fim_prefix_token fim_rate
            fim_split_sample fim_spm_rate fim_suffix_token finetune_data_files finetune_data_split finetune_hf_dataset
            fp16_lm_cross_entropy freeze_all_layers full_validation global_batch_size gpu_sniff_test_interval hysteresis
            init_method_xavier_uniform initial_loss_scale iterations_to_skip lion_beta1 lion_beta2
            logits_load_decode_threads logits_load_dir logits_load_ignore_errors logits_load_kd_loss_alpha
            logits_load_msc_prefetch_depth logits_load_prefetch_factor logits_save_dir logits_save_dtype
            logits_save_top_k logits_save_top_p logits_save_top_p_min_k loss_scale loss_scale_window lr lr_decay_iters
            lr_decay_samples lr_decay_style lr_warmup_fraction lr_warmup_init lr_warmup_iters lr_warmup_samples
            lr_wsd_decay_iters lr_wsd_decay_samples lr_wsd_decay_style main_grads_dtype main_params_dtype manual_gc
            manual_gc_eval manual_gc_interval mask_prob micro_batch_size min_loss_scale min_lr min_scale
            moe_aux_loss_coeff moe_input_jitter_eps moe_router_bias_update_rate moe_router_quantile_balancing_ema
            moe_upcycling_granularity moe_use_upcycling moe_z_loss_coeff multiple_validation_sets muon_coefficient_type
            muon_extra_scale_factor muon_fp32_matmul_prec muon_momentum muon_nesterov muon_num_ns_steps
            muon_scalar_optimizer muon_scale_mode muon_split_qkv muon_tp_mode muon_use_nesterov muon_use_syrk
            no_weight_decay_cond_type optimizer optimizer_cpu_offload optimizer_cuda_graph optimizer_offload_fraction
            perform_initialization pin_cpu_grads pin_cpu_params qad_train_target qk_clip qk_clip_alpha qk_clip_threshold
            rampup_batch_size rerun_mode reset_attention_mask reset_position_ids seed sft sft_tokenizer_prompt_format
            sgd_momentum short_seq_prob skip_train start_eval_at_iter start_weight_decay step_batch_size_schedule
            store_param_remainders teacher_model_config test_mode to_test train_iters train_samples train_sync_interval
            use_precision_aware_optimizer use_torch_optimizer_for_cpu_offload validation_set_names warmup weight_decay
            weight_decay_incr_style
        """,
        "its texts and how they become ids": """
            allow_ambiguous_pad_tokens chat_template create_attention_mask_in_dataloader data_args_path data_cache_path
            data_impl data_path dataloader_defer_npy_index_mmap dataloader_fast_cache_load dataloader_type
            decoder_seq_length encoder_seq_length legacy_tokenizer merge_file metadata_path mid_level_dataset_surplus
            mmap_bin_files mmap_warmup mock_data null_tokenizer_eod_id null_tokenizer_pad_id num_dataset_builder_threads
            num_workers pad_vocab_size padded_vocab_size per_dataset_sequences_path per_split_data_args_path
            renormalize_blend_weights special_tokens split test_data_path tiktoken_num_special_tokens tiktoken_pattern
            tiktoken_special_tokens tokenizer_hf_include_special_tokens tokenizer_hf_no_include_special_tokens
            tokenizer_hf_no_use_fast tokenizer_hf_use_fast tokenizer_metadata tokenizer_model
            tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_sentencepiece_legacy tokenizer_special_tokens
            tokenizer_type train_data_path trust_remote_code use_gigatoken valid_data_path variable_seq_lengths
            vocab_extra_ids vocab_file
        """,
        "checkpoints, and where it stands in its run": """
            allow_transformer_engine ammo_convert_te_to_local_spec ammo_load_classic_megatron_to_mcore
            async_ckpt_cpu_priority async_ckpt_io_priority async_ckpt_use_cpu_shm async_save async_strategy
            auto_detect_ckpt_format ckpt_assume_constant_structure ckpt_convert_format ckpt_convert_save
            ckpt_convert_update_legacy_dist_opt_format ckpt_drop_redundant_extra_state ckpt_format
            ckpt_fully_parallel_load ckpt_fully_parallel_load_exchange_algo ckpt_fully_parallel_load_per_rank_objects
            ckpt_fully_parallel_load_process_group ckpt_fully_parallel_save ckpt_fully_parallel_save_deprecated
            ckpt_fully_parallel_save_process_group ckpt_load_validate_sharding_integrity ckpt_pg_tensors_cache_create
            ckpt_pg_tensors_cache_path ckpt_step consumed_train_bins consumed_train_samples consumed_valid_samples
            curr_iteration disable_msc_deprecated dist_ckpt_format dist_ckpt_format_deprecated
            dist_ckpt_optim_fully_reshardable dist_ckpt_save_pre_mcore_014 dist_ckpt_strictness dist_ckpt_workers
            distrib_optim_fully_reshardable_mem_efficient enable_msc export_default_te_spec export_legacy_megatron
            export_model_type export_offline_model export_te_mcore_model finetune iteration load
            load_main_params_from_ckpt load_model_opt_format no_load_optim no_load_rng no_save_optim no_save_rng
            non_persistent_ckpt_type non_persistent_global_ckpt_dir non_persistent_local_ckpt_algo
            non_persistent_local_ckpt_dir non_persistent_save_interval num_floating_point_operations_so_far
            object_storage_cache_path override_ckpt_iteration override_lr_scheduler override_opt_param_scheduler
            pretrained_checkpoint replication replication_factor replication_jump s3_cache_path save save_interval
            save_retain_interval save_tokenizer_assets skipped_train_samples stream_ckpt_dequant
            strict_fsdp_dtensor_load use_checkpoint_args use_checkpoint_lr_scheduler use_checkpoint_opt_param_scheduler
            use_dist_ckpt use_dist_ckpt_deprecated use_mp_args_from_checkpoint_args use_persistent_ckpt_worker
            use_tokenizer_model_from_checkpoint_args verify_integrity
        """,
        "what is looked at": """
            app_tag_run_name app_tag_run_version barrier_with_L1_time config_logger_dir disable_straggler_on_startup
            dump_param_to_param_group_map enable_one_logger flight_recorder_dump_on_timeout flight_recorder_dump_path
            flight_recorder_extra_dump_on_exec flight_recorder_include_only_active flight_recorder_include_stack_trace
            flight_recorder_trace_buffer_size log_batch_size_to_tensorboard log_device_memory_used log_energy
            log_interval log_learning_rate_to_tensorboard log_loss_scale_to_tensorboard log_max_attention_logit
            log_memory_interval log_memory_to_tensorboard log_num_zeros_in_grad log_params_norm log_progress
            log_straggler log_throughput log_timers_to_tensorboard log_validation_ppl_to_tensorboard
            log_world_size_to_tensorboard logging_level memory_snapshot_path moe_per_layer_logging
            moe_routing_trace_capture_hidden_states moe_routing_trace_capture_logits moe_routing_trace_dump_weights
            moe_routing_trace_max_training_iters moe_routing_trace_path nvtx_ranges one_logger_async one_logger_entity
            one_logger_project one_logger_run_name otel_enabled otel_service_name otel_span_groups profile profile_ranks
            profile_step_end profile_step_start pytorch_profiler_collect_callstack pytorch_profiler_collect_chakra
            pytorch_profiler_collect_shapes record_memory_history record_shapes run_workload_inspector_server
            save_activations_interval save_dgrads_interval save_params_interval save_tokens_per_expert_interval
            save_wgrads_interval straggler_ctrlr_port straggler_minmax_count tensorboard_dir tensorboard_log_interval
            tensorboard_queue_size timing_log_level timing_log_option use_pytorch_profiler wandb_entity wandb_exp_name
            wandb_project wandb_save_dir
        """,
        "on which rank a number lies, and when it travels": """
            DDP_impl account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
            accumulate_allreduce_grads_in_fp32 align_grad_reduce align_param_gather
            async_tensor_model_parallel_allreduce context_parallel_size cp_comm_type create_all_gather_group
            data_parallel_sharding_strategy data_parallel_size ddp_average_in_collective ddp_bucket_size ddp_num_buckets
            ddp_pad_buckets_for_high_nccl_busbw ddp_param_name_patterns_for_fp32_local_accumulation
            ddp_reduce_scatter_with_fp32_accumulation decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
            defer_embedding_wgrad_compute delay_grad_reduce delay_offload_until_cuda_graph delay_param_gather
            delay_wgrad_compute disable_symmetric_registration distributed_backend distributed_timeout_minutes
            distributed_timeout_seconds_after_init enable_full_sharding_in_hsdp enable_gloo_process_groups
            encoder_pipeline_model_parallel_size encoder_tensor_model_parallel_size ep_overlap_early_attn_memory_release
            expert_gtp_weight_remat_size expert_tensor_parallel_num_weight_shards fake_process_group fp32_allreduce
            fsdp_db_use_persist_buf_on_alloc_fail fsdp_double_buffer fsdp_manual_registration grad_reduce_in_bf16
            gtp_expert_remat_nccl_ub gtp_remat_nccl_ub gtp_remat_opt_in_modules
            gtp_remat_reduce_scatter_with_fp32_accumulation gtp_weight_remat_size hierarchical_context_parallel_sizes
            high_priority_a2a_comm_stream high_priority_stream_groups hybrid_context_parallel
            keep_fp8_transpose_cache_when_using_custom_fsdp lazy_mpu_init local_rank max_seqlen_per_dp_cp_rank
            megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_grad_comm_dtype megatron_fsdp_main_grads_dtype
            megatron_fsdp_main_params_dtype megatron_fsdp_max_pool_double_buffer megatron_fsdp_version
            microbatch_group_size_per_vp_stage model_parallel_size moe_combine_bwd_dtype moe_deepep_num_sms
            moe_dispatch_fwd_dtype moe_enable_deepep moe_enable_routing_replay moe_flex_dispatcher_backend
            moe_flex_dispatcher_num_sms moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
            moe_hybridep_num_sms moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs
            moe_ncclep_static_shape moe_ncclep_zero_copy moe_pad_expert_input_to_capacity
            moe_pad_experts_for_cuda_graph_inference moe_permute_fusion moe_permute_fusion_into_hybridep
            moe_shared_expert_overlap moe_token_dispatcher_type moe_token_dropping nccl_communicator_config_path nccl_ub
            num_distributed_optimizer_instances outer_dp_sharding_strategy overlap_cpu_optimizer_d2h_h2d
            overlap_dispatch_backward_with_experts_wgrad overlap_grad_reduce overlap_moe_expert_parallel_comm
            overlap_p2p_comm overlap_p2p_comm_warmup_flush overlap_param_gather overlap_param_gather_with_optimizer_step
            pipeline_model_parallel_comm_backend pipeline_model_parallel_layout pipeline_model_parallel_split_rank rank
            scatter_gather_tensors_in_pipeline sequence_parallel sharp_enabled_group standalone_embedding_stage
            suggested_communication_unit_size symmetric_ar_type tensor_parallel_num_weight_shards
            torch_fsdp2_reshard_after_forward tp_comm_bootstrap_backend tp_comm_bulk_dgrad tp_comm_bulk_wgrad
            tp_comm_overlap tp_comm_overlap_ag tp_comm_overlap_cfg tp_comm_overlap_rs tp_comm_overlap_rs_dgrad
            tp_comm_split_ag tp_comm_split_rs use_contiguous_buffers_in_ddp use_contiguous_buffers_in_local_ddp
            use_custom_fsdp use_distributed_optimizer use_gloo_process_groups use_layer_wise_distributed_optimizer
            use_layer_wise_param_layout use_megatron_fsdp use_ring_exchange_p2p use_sharp use_torch_fsdp2
            use_tp_pp_dp_mapping wgrad_deferral_limit world_size
        """,
        "another way to the same numbers, or to rounded ones": """
            activation_offload_fraction activations_checkpoint_method activations_checkpoint_num_layers
            apply_query_key_layer_scaling apply_rope_fusion attention_backend attention_softmax_in_fp32
            batch_invariant_backend batch_invariant_mode bf16 bias_dropout_fusion bias_gelu_fusion bias_swiglu_fusion
            checkpoint_activations checkpoint_num_layers clone_scatter_output_in_embedding cpu_offloading_num_layers
            cpu_offloading_retain_pinned_cpu_buffers cross_entropy_fusion_impl cross_entropy_loss_fusion cuda_graph_impl
            cuda_graph_modules cuda_graph_scope cuda_graph_scope_deprecated cuda_graph_warmup_steps
            delta_offload_bytes_across_pp_ranks deprecated_use_mcore_models deterministic_mode
            disable_bf16_reduced_precision_matmul disable_jit_fuser distribute_checkpointed_activations
            distribute_saved_activations embedding_weights_in_fp32 enable_cuda_graph enable_experimental
            export_force_local_attention export_kv_cache_quant external_cuda_graph fine_grained_activation_offloading
            fine_grained_offloading_max_inflight_offloads first_last_layers_bf16 flash_attention_version fp16
            fp32_residual_connection fp4 fp4_param fp4_param_gather fp4_quantizer_factory fp4_recipe fp8
            fp8_amax_compute_algo fp8_amax_history_len fp8_e4m3 fp8_hybrid fp8_interval fp8_margin fp8_output_proj
            fp8_param_gather fp8_quantizer_factory fp8_recipe fp8_wgrad fused_residual_rmsnorm
            gradient_accumulation_fusion gradient_reduce_div_fusion init_model_with_meta_device keep_fp8_transpose_cache
            kitchen_attention_backend kitchen_config_file kitchen_recipe_number logit_dtype masked_softmax_fusion
            min_offloaded_tensor_size mlp_chunks_for_prefill mlp_chunks_for_training moe_grouped_gemm
            moe_layer_recompute moe_paged_stash moe_paged_stash_buffer_size_factor_cpu
            moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size moe_router_dtype moe_router_fusion
            moe_router_padding_for_fp8 moe_router_padding_for_quantization moe_use_grouped_tensor
            moe_use_legacy_grouped_gemm nccl_all_reduce_for_prefill no_persist_layer_norm num_layers_at_end_in_bf16
            num_layers_at_start_in_bf16 offload_modules onnx_safe params_dtype recompute_activations
            recompute_granularity recompute_method recompute_modules recompute_num_layers
            reuse_grad_buf_for_mxfp8_param_ag scaled_masked_softmax_fusion scaled_upper_triang_masked_softmax_fusion
            te_precision_config_file te_rng_tracker transformer_impl use_cpu_initialization use_flash_attn
            use_fused_weighted_squared_relu use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert
            use_kitchen_attention use_legacy_models use_mcore_models use_te_activation_func
            use_transformer_engine_op_fuser yaml_cfg
        """,
        "how its processes are watched and restarted": """
            calc_ft_timeouts enable_ft_package ft_num_warmup_iters inprocess_active_world_size inprocess_barrier_timeout
            inprocess_completion_timeout inprocess_empty_cuda_cache inprocess_granularity inprocess_hard_timeout
            inprocess_heartbeat_interval inprocess_heartbeat_timeout inprocess_last_call_wait inprocess_max_iterations
            inprocess_monitor_process_interval inprocess_monitor_thread_interval inprocess_progress_watchdog_interval
            inprocess_restart inprocess_soft_timeout inprocess_termination_grace_time result_rejected_tracker_filename
        """,
        "of inference, reinforcement learning, or a model that is no GPT": """
            bert_binary_head bert_embedder_type bert_load biencoder_shared_query_context_model block_data_path
            classes_fraction data_per_class_fraction data_sharding decode_only_cuda_graphs dino_bottleneck_size
            dino_freeze_last_layer dino_head_hidden_size dino_local_crops_number dino_local_img_size
            dino_norm_last_layer dino_teacher_temp dino_warmup_teacher_temp dino_warmup_teacher_temp_epochs
            disable_chunked_prefill embedding_path enable_chunked_prefill evidence_data_path faiss_use_gpu flash_decode
            grpo_clamp_eps_lower grpo_clamp_eps_upper grpo_default_temperature grpo_default_top_p
            grpo_entropy_term_weight grpo_filter_groups_with_same_reward grpo_group_size grpo_iterations grpo_kl_beta
            grpo_prompts_per_step grpo_samples_per_iteration head_lr_mult ict_head_size ict_load img_dim img_h img_w
            incoming_requests_duration incoming_requests_per_sec incoming_requests_per_step indexer_batch_size
            indexer_log_interval inference_batch_times_seqlen_threshold inference_coordinator_port
            inference_cuda_graph_all_prefills inference_cuda_graph_max_tokens inference_cuda_graph_scope
            inference_disable_ep_consensus inference_disable_triton_nvls_kernels inference_dynamic_batching
            inference_dynamic_batching_async_sched_mode inference_dynamic_batching_block_size
            inference_dynamic_batching_buffer_guaranteed_fraction inference_dynamic_batching_buffer_overflow_factor
            inference_dynamic_batching_buffer_size_gb inference_dynamic_batching_chunk_size
            inference_dynamic_batching_cuda_graph_max_tokens inference_dynamic_batching_cuda_graph_mixed_prefill_count
            inference_dynamic_batching_cuda_graph_sizing_distribution inference_dynamic_batching_enable_prefix_caching
            inference_dynamic_batching_logprobs_mode inference_dynamic_batching_mamba_memory_ratio
            inference_dynamic_batching_max_requests inference_dynamic_batching_max_requests_override
            inference_dynamic_batching_max_tokens inference_dynamic_batching_max_tokens_override
            inference_dynamic_batching_num_cuda_graphs inference_dynamic_batching_paused_buffer_size_gb
            inference_dynamic_batching_prefix_caching_coordinator_policy
            inference_dynamic_batching_prefix_caching_eviction_policy inference_dynamic_batching_prefix_caching_mamba_gb
            inference_dynamic_batching_prefix_caching_routing_alpha inference_dynamic_batching_sampling_backend
            inference_dynamic_batching_track_generated_token_events
            inference_dynamic_batching_track_paused_request_events inference_dynamic_batching_unified_memory_level
            inference_fuse_tp_communication inference_grouped_gemm_backend inference_logging_step_interval
            inference_max_batch_size inference_max_requests inference_max_seq_length
            inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type inference_rng_tracker
            inference_shards inference_text_gen_server_logging inference_use_synchronous_zmq_collectives
            inference_wandb_logging iter_per_epoch langrl_env_config langrl_external_server
            langrl_inference_server_conversation_template langrl_inference_server_type mask_factor mask_type
            max_tokens_to_oom model_provider model_type num_channels num_classes num_speculative_tokens
            num_tokens_from_file num_tokens_to_generate num_tokens_to_prompt offset_sampling_seed_by_dp_rank
            output_bert_embeddings output_every_n_results output_path patch_dim perform_rl_step prompt_file
            prompt_file_num_truncate prompts query_in_block_prob random_sample_prompts record_throughput refit_method
            report_topk_accuracies return_log_probs rl_calculate_intra_group_similarity rl_consumption_granularity
            rl_default_temperature rl_default_top_k rl_default_top_p rl_durable_rollout_bank rl_enforce_generation_order
            rl_generation_batch_size rl_generation_lag rl_importance_sampling_truncation_coef
            rl_inference_expert_model_parallel_size rl_inference_expert_tensor_model_parallel_size
            rl_inference_logprobs_is_correction rl_inference_model_unified_memory_level rl_inference_parsers
            rl_inference_pipeline_model_parallel_size rl_inference_tensor_model_parallel_size
            rl_kv_cache_management_mode rl_max_inflight_requests rl_num_parallel_generation_batches
            rl_num_parallel_generations rl_offload_inference_model_weights_when_idle rl_offload_kv_cache_during_training
            rl_offload_optimizer_during_inference rl_parallel_generation_tasks rl_partial_rollouts
            rl_persist_cuda_graphs rl_profile rl_profile_dir rl_prompts_per_eval rl_remove_kv_cache_during_training
            rl_reset_cuda_graphs rl_rollout_bank_dir rl_rollout_bank_max_bytes rl_sequence_packing_algo
            rl_sequence_packing_bin_size rl_sequence_packing_max_sequences_per_bin rl_skip_bos_token
            rl_submission_granularity rl_training_cuda_graphs rl_use_sequence_packing rl_verify_model_weights_swap
            sample_rate skip_prompt_log_probs stop_words swin_backbone_type temperature titles_data_path top_k
            top_n_logprobs top_p use_flashinfer_fused_rope use_legacy_static_engine use_one_sent_docs
            vision_backbone_type vision_pretraining_type
        """,
        "detail of a feature that must be off (see REQUIRED)": """
            cache_mla_latents disable_mamba_mem_eff_path dsa_indexer_head_dim dsa_indexer_k_norm_epsilon
            dsa_indexer_k_norm_fp32 dsa_indexer_loss_coeff dsa_indexer_n_heads dsa_indexer_rope_interleaved
            dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_skip_topk_offset dsa_indexer_topk
            dsa_indexer_topk_freq dsa_indexer_use_sparse_loss dsa_kernel_backend export_draft_vocab_size
            export_eagle_algorithm export_freeze_mtp freeze_base_for_mtp gdp_cutedsl_kernel
            gdp_num_chunk_states_to_recompute gdp_num_householder kv_lora_rank linear_conv_kernel_dim
            linear_key_head_dim linear_num_key_heads linear_num_value_heads linear_value_head_dim mamba_head_dim
            mamba_inference_conv_states_dtype mamba_inference_ssm_states_dtype mamba_num_groups mamba_num_heads
            mamba_state_dim mamba_training_ssm_states_dtype mhc_init_gating_factor mhc_num_residual_streams
            mhc_recompute_layer_num mhc_sinkhorn_iterations mla_down_proj_fusion mscale mscale_all_dim mtp_detach_heads
            mtp_hsm mtp_hybrid_override_pattern mtp_loss_scaling_factor mtp_standalone mtp_use_repeated_layer
            mup_attn_scale_power mup_base_head_dim mup_base_hidden_size phase_transition_iterations q_lora_rank
            qk_head_dim qk_pos_emb_head_dim relative_attention_max_distance relative_attention_num_buckets
            retriever_report_topk_accuracies retriever_score_scaling retriever_seq_length retro_attention_gate
            retro_cyclic_train_iters retro_encoder_attention_dropout retro_encoder_hidden_dropout retro_encoder_layers
            retro_num_neighbors retro_num_retrieved_chunks retro_project_dir retro_return_doc_ids
            retro_verify_neighbor_count retro_workdir rope_scaling_factor rope_type rotary_scaling_factor
            use_mamba_mem_eff_path v_head_dim yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
            yarn_original_max_position_embeddings
        """,
    }
)
WITHOUT_EFFECT = frozenset(" ".join(_WITHOUT_EFFECT.values()).split())
