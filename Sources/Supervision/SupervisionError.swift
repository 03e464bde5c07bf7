import ControlProtocol
import HostSystem

/// Why a VM could not be started or could not go on. Every case has one line (`message`) with the thing and the remedy,
/// and an exit code.
package enum SupervisionError: Error, Sendable {
  /// /dev/kvm does not exist.
  case noKVM
  /// /dev/kvm cannot be opened.
  case kvmDenied(Errno)
  /// A file could not be opened. `what` reads "kernel", "image of disk blk0".
  case file(what: String, path: String, Errno)
  /// The path is something else than the use wants.
  case wrongKind(what: String, path: String, wants: String)
  /// The file is empty.
  case empty(what: String, path: String)
  /// The payload does not fit the guest's memory.
  case tooLarge(what: String, path: String, byteCount: UInt64, memory: UInt64)
  /// It begins like an image that is more than a disk's bytes.
  case otherFormat(disk: String, path: String, ImageFormat)
  /// Another process holds the image.
  case imageInUse(disk: String, path: String, holder: String?)
  /// The interface does not exist.
  case tapMissing(net: String, tap: String)
  /// Another process is attached to it.
  case tapBusy(net: String, tap: String)
  /// The interface exists and is no tap.
  case notATap(net: String, tap: String)
  /// Not permitted, or some other failure.
  case tap(net: String, tap: String, Errno)
  /// /dev/net/tun cannot be opened.
  case noTun(net: String, Errno)
  /// Connecting to an external back end failed.
  case backendSocket(device: String, path: String, Errno)
  /// A socket of ours cannot be made.
  case ownSocket(option: String, path: String, Errno)
  /// No pseudo-terminal to be had.
  case pseudoTerminal(option: String, Errno)
  /// A program of ours is not there.
  case program(name: String, directory: String, Errno)
  /// A process could not be brought up to its exec.
  case launch(String)
  /// A process said no READY in time.
  case notReady(process: String, program: String, milliseconds: UInt32)
  /// The core was not ready in time, with more memory to set up than the host has.
  case memoryTooLarge(size: UInt64, host: UInt64, milliseconds: UInt32)
  /// A process ended before its READY.
  case endedEarly(process: String, program: String, end: ProcessEnd)
  /// The core cannot go on.
  case core(CoreMessage.FailureKind, String)
  /// The core's messages make no sense.
  case coreProtocol(MessageError)
  /// The core died.
  case coreLost(ProcessEnd)
  /// The uid range does not fit.
  case identities(String)
  /// Parts of the walls are not to be had here, and `--hardened` wants all.
  case notHardened(lacks: [String])
  /// A limit cannot be kept here. The sentence says which and what to do.
  case limits(String)
  /// An external back end cannot be started in its jail.
  case jail(String, JailError)
  /// A kernel call that fails only when the host is exhausted.
  case system(SystemError)

  package var exitCode: ExitCode {
    switch self {
    case .file, .wrongKind, .empty, .tooLarge, .otherFormat, .imageInUse, .tapMissing, .tapBusy, .notATap, .tap, .backendSocket,
      .ownSocket:
      .resource
    case .noKVM, .kvmDenied, .memoryTooLarge, .noTun, .pseudoTerminal, .program, .launch, .identities, .notHardened, .limits,
      .system:
      .host
    case .jail(_, .host), .jail(_, .step): .host
    case .jail: .resource
    case .notReady, .endedEarly: .device
    case .core(let kind, _):
      switch kind {
      case .input: .resource
      case .host: .host
      case .device: .device
      case .defect: .defect
      }
    case .coreProtocol: .defect
    case .coreLost: .coreLost
    }
  }

  /// nil when the process concerned has already printed its sentence.
  package var message: String? {
    switch self {
    case .noKVM:
      "There is no /dev/kvm; load the module (modprobe kvm_intel or kvm_amd) or see martlet doctor"
    case .kvmDenied(.accessDenied), .kvmDenied(.notPermitted):
      "No permission to open /dev/kvm; join the group that owns it (usually: usermod -aG kvm USER, then log in again)"
    case .kvmDenied(let errno): "Cannot open /dev/kvm: \(errno.explanation); see martlet doctor"
    case .file(let what, let path, let errno): "Cannot open \(what) '\(path)': \(Self.remedy(errno))"
    case .wrongKind(let what, let path, let wants): "Cannot use \(what) '\(path)': it is not \(wants); name one"
    case .empty(let what, let path): "Cannot use \(what) '\(path)': it is empty; name a complete file"
    case .tooLarge(let what, let path, let count, let memory):
      "The \(what) '\(path)' has \(count) bytes and does not fit into the guest's memory of "
        + "\(Quantity.describe(byteCount: memory)); raise --memory size="
    case .otherFormat(let disk, let path, let format):
      "Image '\(path)' of disk \(disk) is in the format \(format.rawValue), and only raw images are served; convert it (qemu-img convert -O "
        + "raw), or add format=raw to the disk's keys if its bytes are the disk"
    case .imageInUse(let disk, let path, let holder):
      "Image '\(path)' of disk \(disk) is in use\(holder.map { " by \($0)" } ?? ""); end that use or name another image"
    case .tapMissing(let net, let tap):
      "There is no interface '\(tap)' for \(net); make it: ip tuntap add dev \(tap) mode tap, ip link set \(tap) up"
    case .tapBusy(let net, let tap):
      "Tap '\(tap)' of \(net) is busy: another process is attached to it; end that process or name another tap"
    case .notATap(let net, let tap): "Interface '\(tap)' of \(net) is not a tap; name a tap (ip tuntap show lists them)"
    case .tap(let net, let tap, .notPermitted), .tap(let net, let tap, .accessDenied):
      "No permission for tap '\(tap)' of \(net); make it yours: ip tuntap add dev \(tap) mode tap user USER"
    case .tap(let net, let tap, let errno): "Cannot attach to tap '\(tap)' of \(net): \(errno.explanation)"
    case .noTun(let net, .noEntry):
      "There is no /dev/net/tun, which \(net) wants; load the module: modprobe tun"
    case .noTun(let net, let errno): "Cannot open /dev/net/tun for \(net): \(Self.remedy(errno))"
    case .backendSocket(let device, let path, .connectionRefused):
      "Back end of \(device) refuses at '\(path)': nobody listens there; start the back end first"
    case .backendSocket(let device, let path, .timedOut):
      "Back end of \(device) does not accept at '\(path)' in time; is it serving another VM?"
    case .backendSocket(let device, let path, let errno):
      "Cannot connect to the back end of \(device) at '\(path)': \(Self.remedy(errno))"
    case .ownSocket(let option, let path, Errno(98)):
      if (try? OwnedFD.open(path, pathOnly | noFollow).status().kind) == .socket {
        "Socket '\(path)' of \(option) is in use by another process; name another path"
      } else {
        "There is something at '\(path)' of \(option) that is no socket, and it stays; name another path or remove it"
      }
    case .ownSocket(let option, let path, let errno): "Cannot make socket '\(path)' of \(option): \(Self.remedy(errno))"
    case .pseudoTerminal(let option, let errno): "Cannot make a pseudo-terminal for \(option): \(errno.explanation)"
    case .program(let name, let directory, let errno):
      "Program \(name) cannot be opened in \(directory): \(errno.explanation); install all of Martlet's programs together"
    case .launch(let sentence): sentence
    case .notReady(let process, let program, let time):
      "\(program) of \(process) was not ready within \(time) ms; look at its messages or raise --deadline ready="
    case .memoryTooLarge(let size, let host, let time):
      "Memory of \(Quantity.describe(byteCount: size)) could not be set up within \(time) ms; this host has "
        + "\(host >> 20)M: lower --memory size= or raise --deadline ready="
    case .endedEarly(_, let program, .exited(code: 1)) where program.hasPrefix("martlet-"): nil
    case .endedEarly(_, let program, .exited(code: 2)) where program.hasPrefix("martlet-"): nil
    case .endedEarly(let process, let program, let end):
      "\(program) of \(process) \(end) before it was ready\(program.hasPrefix("martlet-") ? "" : "; " + JailProgram.hidingRemedy)"
    case .core(_, let sentence): sentence
    case .coreProtocol(let error): "\(error.message); are all programs of one version?"
    case .coreLost(let end): "The core process \(end); the VM has ended"
    case .identities(let sentence), .limits(let sentence): sentence
    case .notHardened(let lacks):
      "This host cannot build all walls, and --hardened wants them: \(lacks.joined(separator: ". ")). "
        + "Mend the host or leave out --hardened"
    case .jail(let device, let error): "Back end of \(device): \(error.message)"
    case .system(let error): error.description
    }
  }

  /// The kernel's answer with what to do about it.
  private static func remedy(_ errno: Errno) -> String {
    switch errno {
    case .noEntry: "it does not exist; check the path"
    case .accessDenied, .notPermitted: "permission denied; check its owner and mode"
    case .notADirectory: "a part of the path is not a directory; check the path"
    case .busy: "it is busy; end its other use (is it mounted?)"
    case Errno(30): "the file system is read-only; write readonly=on or move the file"
    default: errno.explanation
    }
  }
}
