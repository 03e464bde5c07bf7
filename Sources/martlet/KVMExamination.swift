import CLinux
import HostSystem
import KVM

/// Whether KVM is there, has what Martlet uses, and really executes what a kernel executes.
enum KVMExamination {
  static func findings() -> [Finding] {
    let fd: OwnedFD
    do throws(SystemError) { fd = try OwnedFD.open("/dev/kvm", O_RDWR) } catch {
      let remedy =
        switch error.errno {
        case .noEntry: "modprobe kvm_intel or kvm_amd; enable virtualization in the firmware; or use a host that has it"
        case .accessDenied, .notPermitted: "usermod -aG kvm USER (or the group that owns /dev/kvm), then log in again"
        default: "look at dmesg for what kvm says"
        }
      return [Finding("kvm", .missing, "/dev/kvm cannot be opened: \(error.errno.explanation)", remedy: remedy)]
    }
    do throws(KVMError) {
      let system = try System(adopting: fd)
      return [capabilities(system), try instructions(system)]
    } catch {
      return [Finding("kvm", .missing, error.description, remedy: "look at dmesg for what kvm says")]
    }
  }

  private static func capabilities(_ system: borrowing System) -> Finding {
    let missing = system.missingCapabilities()
    guard missing.isEmpty else {
      return Finding(
        "kvm", .missing, "KVM lacks " + missing.map(\.name).joined(separator: ", "),
        remedy: "use a Linux kernel of 5.10 or later")
    }
    return Finding(
      "kvm", .good,
      "all \(Capability.required.count) capabilities needed; up to \(system.value(of: .maximumVCPUs)) processors, "
        + "\(system.value(of: .memorySlots)) memory slots")
  }

  private static func instructions(_ system: borrowing System) throws(KVMError) -> Finding {
    let table = try system.supportedCPUID()
    var tried = 0
    var failed: [String] = []
    for check in InstructionCheck.all where check.applies(to: table) {
      tried += 1
      if case .fails(let why) = try check.perform(system, table) { failed.append("\(check.name) (\(why))") }
    }
    guard failed.isEmpty else {
      return Finding(
        "instructions", .missing,
        "of \(tried) instructions that a kernel needs, \(failed.count) fail: \(failed.joined(separator: ", "))",
        remedy: "this KVM emulates the processor in software; use a host with hardware virtualization, or scripts/lab")
    }
    return Finding("instructions", .good, "all \(tried) tried in a guest work")
  }
}
