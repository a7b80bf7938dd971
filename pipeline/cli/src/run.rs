//! `capfilt run`: do what is not done yet.

use std::process::ExitCode;

use crate::args::RunArgs;
use crate::job::Job;
use crate::output::Failure;
use crate::overview::show_plan;

pub(crate) async fn run(args: RunArgs) -> Result<ExitCode, Failure> {
    let config = args.config.load()?;
    if args.dry_run {
        return show_plan(config, args.json).await;
    }
    let job = Job::prepare(config).await?;
    if args.retry_failed {
        for failure in job.store.all_failures().await? {
            job.store.forget_failures(&failure.task_id).await?;
        }
    }
    job.work(args.json, None).await
}
