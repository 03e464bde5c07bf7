/// What `martlet ctl` can ask for.
package enum ControlVerb: String, CaseIterable, Sendable {
  case info, devices, pause, resume
  case powerButton = "power-button"
  case reboot, shutdown
  case stats
  case resizeDisk = "resize-disk"
  case events, conversation
  case add, remove
  case replace, upgrade
  case upgradeSupervisor = "upgrade-supervisor"

  package var summary: String {
    switch self {
    case .info: "state, size and uptime of the VM and its processes"
    case .devices: "each device's program, pid, uid, processor time, state, queues and features"
    case .pause: "stop the processors"
    case .resume: "let the processors go on"
    case .powerButton: "press the power button; the guest decides what follows"
    case .reboot: "reset the VM at once, as the reset button would"
    case .shutdown: "end the VM at once"
    case .stats: "requests, bytes, errors, kicks, calls and latencies of each queue"
    case .add: "plug in a device: disk, net, console, fs, rng or generic, with the keys of martlet run --KIND"
    case .remove: "let the guest let go of a device and take it away; --force: without asking; --timeout MS"
    case .replace: "another back end takes over under the running guest; the options follow below"
    case .upgrade: "the installed programs take over, device by device, and last the supervisor"
    case .upgradeSupervisor: "only the supervisor goes over to the installed program; --dry-run: only say whether it could"
    case .resizeDisk: "make a disk's image longer or shorter, or see that somebody has, and tell the guest"
    case .conversation: "the latest messages to and from a device's back end, or the one it lost, for martlet probe decode"
    case .events: "what happened to the devices, with times; with --follow also what will; with --json a line for each"
    }
  }

  /// What may follow the word, in order; the first `neededArguments` have to.
  package var arguments: [String] {
    switch self {
    case .stats: ["DEVICE"]
    case .resizeDisk: ["DEVICE", "SIZE"]
    case .events: ["--follow"]
    case .add: ["KIND", "KEY=VALUE,..."]
    case .remove: ["DEVICE", "--force", "--timeout MS"]
    case .conversation: ["DEVICE"]
    case .replace: ["DEVICE", "OPTION ...", "-- PROGRAM ARGUMENT ..."]
    case .upgradeSupervisor: ["--dry-run"]
    default: []
    }
  }

  package var neededArguments: Int {
    switch self {
    case .add: 2
    case .resizeDisk, .remove, .conversation, .replace: 1
    default: 0
    }
  }

  /// The verb with its arguments, for help texts.
  package var usage: String {
    rawValue + arguments.enumerated().map { $0.offset < neededArguments ? " \($0.element)" : " [\($0.element)]" }.joined()
  }
}
