import Foundation
import Probe
import TestSupport
import Testing

private var brokenBackEnd: String {
  URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent().appendingPathComponent("broken-backend").path
}

/// Runs the program; its exit code, and the JSON it wrote.
private func bench(_ words: [String], _ type: String) throws -> (code: Int32, json: [String: Any]) {
  let path = NSTemporaryDirectory() + "probe-bench-\(UUID().uuidString).json"
  defer { try? FileManager.default.removeItem(atPath: path) }
  let code = ProbeProgram.run(
    ["martlet-probe", "bench", "--output-format", "json", "--output", path, "--runtime", "0.2", "--ramp-time", "0.05"] + words
      + ["--", brokenBackEnd, "{socket}", type])
  guard let data = FileManager.default.contents(atPath: path) else { return (code, [:]) }
  return (code, try JSONSerialization.jsonObject(with: data) as? [String: Any] ?? [:])
}

@Suite("Probe: bench", .serialized)
struct BenchTests {
  @Test("measures a disk, in order and packed", arguments: [[], ["--packed"], ["--wait", "sleep"], ["--rw", "randrw", "--fsync", "3"]])
  func disk(extra: [String]) throws {
    let (code, json) = try bench(["--bs", "4k", "--iodepth", "8"] + extra, "block")
    #expect(code == 0)
    let job = try #require((json["jobs"] as? [[String: Any]])?.first)
    let read = try #require(job["read"] as? [String: Any])
    #expect((read["total_ios"] as? Int ?? 0) > 100)
    #expect(job["total_err"] as? Int == 0)
    // What readers of fio's output look for.
    let mean = try #require(read["iops_mean"] as? Double)
    let least = try #require(read["iops_min"] as? Double)
    #expect(mean > 0 && least <= mean && mean <= (read["iops_max"] as? Double ?? 0) + 1)
    #expect((read["bw_mean"] as? Double ?? 0) > 0 && (read["slat_ns"] as? [String: Any])?["N"] as? Int == 0)
    let ours = try #require(job["martlet"] as? [String: Any])
    #expect((ours["back_end_cpu_ns_per_request"] as? Double ?? 0) > 0)
    // Where tracing is allowed at all, as it is of a child.
    #expect(ours["back_end_system_calls_per_request"] as? Double != nil)
    if extra.contains("randrw") {
      #expect(((job["write"] as? [String: Any])?["total_ios"] as? Int ?? 0) > 30)
      #expect(((job["sync"] as? [String: Any])?["total_ios"] as? Int ?? 0) > 10)
    }
  }

  @Test("measures a network card it was not told about, one run for each size of frame", arguments: [[], ["--packed"]])
  func network(extra: [String]) throws {
    let (code, json) = try bench(["--mode", "send", "--frame-size", "64,1500"] + extra, "net")
    #expect(code == 0)
    let jobs = try #require(json["jobs"] as? [[String: Any]])
    #expect(jobs.map { ($0["job options"] as? [String: Any])?["frame_size"] as? String } == ["64", "1500"])
    for job in jobs {
      let ours = try #require(job["martlet"] as? [String: Any])
      #expect((ours["requests_per_s"] as? Double ?? 0) > 1000)
      #expect((job["write"] as? [String: Any])?["total_ios"] as? Int ?? 0 > 100)
    }
  }

  @Test("ends with 2 when nothing moves, when the far end is not there, and for options of the other kind")
  func bad() throws {
    // The test's card gives nothing back.
    #expect(try bench(["--mode", "receive"], "net").code == 2)
    #expect(try bench(["--mode", "loop", "--far-end", "nowhere0"], "net").code == 2)
    #expect(try bench(["--mode", "send", "--bs", "4k"], "net").code == 2)
    #expect(try bench(["--type", "blk", "--mode", "send"], "block").code == 2)
    #expect(try bench(["--frame-size", "12"], "net").code == 2)
    #expect(try bench(["--mode", "send", "--numjobs", "9"], "net").code == 2)
  }
}
