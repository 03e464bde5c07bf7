/// What `martlet ctl` can ask for.
package enum ControlVerb: String, CaseIterable, Sendable {
  case info, devices, pause, resume
  case powerButton = "power-button"
  case reboot, shutdown

  package var summary: String {
    switch self {
    case .info: "state, size and uptime of the VM and its processes"
    case .devices: "each device's program, pid, uid, processor time, state, queues and features"
    case .pause: "stop the processors"
    case .resume: "let the processors go on"
    case .powerButton: "press the power button; the guest decides what follows"
    case .reboot: "reset the VM at once, as the reset button would"
    case .shutdown: "end the VM at once"
    }
  }
}
