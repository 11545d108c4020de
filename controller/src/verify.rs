//! `controller verify-audit`: looks at every record of the audit, whether the controller runs or not, and names the
//! first of each organisation that is not what was recorded.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::{Context as _, Result, ensure};
use sandgate_api::rest::AuditVerification;

use crate::{config::Config, installation::InstallationKey, ledger::Ledger, store::Store};

/// Says a line for each organisation. The exit status is 0 when nothing is wrong.
///
/// # Errors
/// When the database, the key or the signed heads cannot be read.
pub fn run(config: &Config) -> Result<ExitCode> {
    let key = config.data_dir.join("installation.key");
    ensure!(
        key.is_file(),
        "{} is missing: without it nothing can be verified",
        key.display()
    );
    let installation = InstallationKey::open(&key)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting")?;
    runtime.block_on(async {
        let store = Store::look_at(&config.database)
            .await
            .with_context(|| format!("opening the database {}", config.database.display()))?;
        let ledger = Ledger::new(store, &installation, &config.data_dir);
        let mut status = ExitCode::SUCCESS;
        let mut output = io::stdout().lock();
        for org_id in ledger.organizations().await? {
            let verification = ledger.verify(&org_id).await?;
            if !verification.verified {
                status = ExitCode::FAILURE;
            }
            writeln!(output, "{org_id}  {}", in_words(&verification))
                .context("writing to standard output")?;
        }
        Ok(status)
    })
}

fn in_words(verification: &AuditVerification) -> String {
    let AuditVerification {
        records, unchained, ..
    } = verification;
    let found = format!("{records} records are what was recorded, {unchained} are from before the chain");
    match &verification.problem {
        None => format!("verified  {found}"),
        Some(problem) => {
            let position = problem
                .position
                .map(|position| format!(" at position {position}"));
            let event = problem.event_id.as_ref().map(|id| format!(", record {id}"));
            format!(
                "CHANGED   {found}{}{}: {}",
                position.unwrap_or_default(),
                event.unwrap_or_default(),
                problem.message
            )
        }
    }
}
