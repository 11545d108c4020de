//! `GET /sandbox/:id/network/doctor`, and the self-test host that it asks.

use serde::{Deserialize, Serialize};

use crate::id::SandboxId;

/// The name of netd's self-test host. Every sandbox may ask for it, whatever its policy says; netd answers the
/// question and the connection itself.
pub const DOCTOR_HOST: &str = "doctor.sandgate.internal";

/// What [`SelfTest::sandgate`] says.
pub const DOCTOR: &str = "doctor";

/// What the self-test host answers to a GET.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelfTest {
    /// Always [`DOCTOR`].
    pub sandgate: String,
    /// Who was asking, as netd knows it.
    pub sandbox_id: SandboxId,
}

/// Whether the programs inside reach netd and trust the sandbox's authority.
///
/// It is the sandbox that answers: code inside can make it look better or worse than it is.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkDoctor {
    /// The examination took place. Always true, whatever it found.
    pub success: bool,
    /// The name is answered, there is a client, and every client that is installed is well.
    pub healthy: bool,
    /// [`DOCTOR_HOST`].
    pub host: String,
    /// One entry per known client, in a fixed order.
    pub clients: Vec<DoctorClient>,
    /// How the name is resolved inside.
    pub dns: DoctorFinding,
}

/// One client of [`NetworkDoctor`].
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoctorClient {
    /// Which one.
    pub name: String,
    /// What was found.
    #[serde(flatten)]
    pub finding: DoctorFinding,
}

/// What an examination found.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoctorFinding {
    /// The program is there. One that is not says nothing about the sandbox's health.
    pub installed: bool,
    /// It was answered as it should be.
    pub ok: bool,
    /// For people; at most 300 characters, without control characters. The sandbox may have written it.
    pub detail: String,
}
