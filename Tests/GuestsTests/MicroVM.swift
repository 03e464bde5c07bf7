// A micro guest under Martlet: `martlet run` with every device in its own process, the serial port on standard output.

import Foundation
import TestSupport
import Testing

/// A directory with disks for one VM, and the ways to run it. Removed with this object.
final class MicroVM {
  static let canRun = MicroGuest.hasKVM && BuiltPrograms.exists("martlet-core")
  static let cannotRun: Comment = "This machine has no /dev/kvm that we may open, or the programs are not built."
  /// Taps are made in network namespaces of their own.
  static let canMakeTaps: Bool = {
    guard canRun, geteuid() == 0,
      let program = try? RunningProgram("/usr/bin/unshare", ["--net", "ip", "tuntap", "add", "t", "mode", "tap"])
    else { return false }
    return program.wait().code == 0
  }()
  static let cannotMakeTaps: Comment = "This machine cannot make a tap in a network namespace: root, /dev/net/tun and ip are needed."

  let directory: String
  let name: String
  /// Of back ends that the test itself has started, and may have killed.
  var foreignSockets: Set<String> = []

  init() throws {
    let number = UInt32.random(in: 0 ... .max)
    name = "micro\(number)"
    directory = "/tmp/martlet-\(name)"
    try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
    chmod(directory, 0o755)
  }

  deinit { try? FileManager.default.removeItem(atPath: directory) }

  func path(_ file: String) -> String { directory + "/" + file }

  /// An empty image; the option that makes a disk of it.
  func disk(_ file: String = "disk.img", mebibytes: Int = 16, _ keys: String = "") throws -> [String] {
    guard FileManager.default.createFile(atPath: path(file), contents: nil), truncate(path(file), mebibytes << 20) == 0 else {
      throw TestFailure("\(file) cannot be made")
    }
    return ["--disk", "path=\(file)\(keys)"]
  }

  /// The words of `martlet run`.
  func command(_ commandLine: String, _ options: [String] = [], image: MicroGuest.Image = .elf) throws -> [String] {
    var words = [
      BuiltPrograms.path("martlet"), "run", "--kernel", try MicroGuest.path(of: image), "--cmdline", commandLine, "--name", name,
    ]
    for (option, value) in [("--memory", "size=128M"), ("--console", "null"), ("--serial", "tty"), ("--control", "ctl")]
    where !options.contains(option) {
      words += [option, value]
    }
    return words + options
  }

  func start(_ commandLine: String, _ options: [String] = [], image: MicroGuest.Image = .elf, below wrapper: [String] = []) throws
    -> RunningProgram
  {
    let words = wrapper + (try command(commandLine, options, image: image))
    return try RunningProgram(words[0], Array(words.dropFirst()), directory: directory)
  }

  /// The VM at a terminal. `meanwhile`, in Python, is done when the guest's console is there; then the console must answer, and the escape
  /// key (`key`) or SIGKILL (`kill`) ends what was started. The terminal's settings must be what they were.
  func runAtATerminal(_ end: String, _ options: [String] = [], seconds: Int, steps: Int, meanwhile: String) throws {
    let script = """
      import fcntl, os, pty, re, signal, subprocess, sys, termios, time
      master, slave = pty.openpty()
      before = termios.tcgetattr(slave)
      vm = subprocess.Popen(sys.argv[2:], stdin=slave, stdout=slave)
      seen = b""
      while b"MICRO-CONSOLE READY" not in seen: seen += os.read(master, 4096)
      assert termios.tcgetattr(slave) != before, "the terminal is not raw"
      \(meanwhile)
      os.write(master, b"abc")
      while b"abc" not in seen: seen += os.read(master, 4096)
      if sys.argv[1] == "key": os.write(master, b"\\x01x")
      else: os.kill(vm.pid, signal.SIGKILL)
      code = vm.wait(\(seconds))
      for _ in range(\(steps)):
          if termios.tcgetattr(slave) == before: break
          time.sleep(0.01)
      assert termios.tcgetattr(slave) == before, "the terminal is not put right"
      sys.exit(0 if code == (0 if sys.argv[1] == "key" else -9) else 1)
      """
    let words = try command("test=console bytes=100", ["--console", "tty", "--serial", "file=serial"] + options)
    let result = try RunningProgram("/usr/bin/env", ["python3", "-c", script, end] + words, directory: directory)
      .wait(seconds: Double(2 * seconds))
    #expect(result.code == 0, "\(end): \(result.errors)")
    expectNothingLeft()
  }

  /// Runs the guest to its end; nothing may be left then.
  func run(
    _ commandLine: String, _ options: [String] = [], image: MicroGuest.Image = .elf, below wrapper: [String] = [], seconds: Double = 120
  ) throws -> MicroRun {
    let result = try start(commandLine, options, image: image, below: wrapper).wait(seconds: seconds)
    expectNothingLeft()
    return MicroRun(result)
  }

  /// Waits until the guest has said `text` so often.
  func wait(for text: String, times: Int = 1, of program: RunningProgram, seconds: Double = 60) throws {
    let end = Date().addingTimeInterval(seconds)
    while Date() < end {
      if program.outputText.components(separatedBy: text).count > times { return }
      if !program.isRunning { break }
      usleep(5000)
    }
    throw TestFailure("'\(text)' was not said \(times) times: \(program.outputText.suffix(2000)) \(program.errorText)")
  }

  func ctl(_ verb: String) throws -> ProgramResult {
    try RunningProgram(BuiltPrograms.path("martlet"), ["ctl", "--control", path("ctl"), "--json", verb]).wait()
  }

  /// This VM's processes by the last part of their titles.
  var processes: [String: Int32] {
    MicroGuest.processes(ofVM: name)
  }

  /// True of every VM that has ended: no process and no socket of its own.
  func expectNothingLeft(_ location: SourceLocation = #_sourceLocation) {
    let end = Date().addingTimeInterval(60)
    while !processes.isEmpty, Date() < end { usleep(5000) }
    let left = processes
    #expect(left.isEmpty, sourceLocation: location)
    for pid in left.values { kill(pid, SIGKILL) }
    for file in (try? FileManager.default.contentsOfDirectory(atPath: directory)) ?? [] where !foreignSockets.contains(file) {
      var status = stat()
      let isSocket = lstat(path(file), &status) == 0 && status.st_mode & S_IFMT == S_IFSOCK
      #expect(!isSocket, "\(file) is left", sourceLocation: location)
    }
  }
}

extension MicroRun {
  init(_ result: ProgramResult) {
    let lines = result.output.split(whereSeparator: \.isNewline)
    self.init(
      exitStatus: result.signal == nil ? result.code : nil, output: result.output, errors: result.errors,
      reports: lines.compactMap(MicroReport.init(line:)))
  }

  /// The guest and the monitor came to their good ends, and the monitor had nothing to say.
  var isClean: Bool { passed && exitStatus == 0 && errors.isEmpty }
}
